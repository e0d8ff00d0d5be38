"""MLflow's pages: how to open the runs of an experiment, what their table shows, and a note above it."""

import base64
import json
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE  # an experiment's note has the same name
from mlflow.utils.rest_utils import http_request
from mlflow.utils.time import get_current_time_millis

import lineage
from lineage import store

# MLflow keeps named views of a table in tags of the experiment, in a format that is documented nowhere. This release
# is the one with which we looked at ours; with another, no view is better than a broken one.
RELEASE = "3.17.2"
VIEW = "results"
TAG = f"mlflow.sharedViewState.{VIEW}"
CLICK = "No runs here? Click *Model training* once."


def lead(experiment: str, note: str, columns: Sequence[str], group: str = "", values: Sequence[str] = ()) -> str:
    """Prepare the page of an experiment in the store that is open, and say how to open it.

    Args:
        experiment: its name.
        note: what the page says above the runs, in Markdown.
        columns: what the table shows, such as "metrics.`accuracy`"; without groups, the highest of the first comes
            first.
        group: a tag; the runs with the same value of it become one closed row, with their means.
        values: the values of this tag.

    Returns:
        Lines for people; the address is the last.
    """
    table = _table(columns) | (_groups(group, values) if group else {})
    view = f"&viewStateShareKey={VIEW}" if _prepare(experiment, f"{CLICK} {note}", table) else ""
    runs = f"#/experiments/{store.experiment_id(experiment)}/runs?workflowType=machine_learning{view}"
    if store.CHOSEN.startswith("http"):
        return f"to see it, open\n{store.first_line(store.CHOSEN).rstrip('/')}/{runs}"
    other = ' --backend-store-uri "$MLFLOW_TRACKING_URI"' if store.CHOSEN else ""
    root, program = lineage.ROOT, Path(sys.executable).with_name("mlflow")
    start = quote(str(program.relative_to(root) if program.is_relative_to(root) else program))
    return f"to see it: cd {quote(str(root))} && {start} ui{other}\nhttp://127.0.0.1:5000/{runs}"


def _prepare(experiment: str, note: str, table: dict[str, Any]) -> bool:
    """Write note and view, unless they are there; tell if there is a view. Without them a run is as good as with."""
    with suppress(MlflowException, OSError, ValueError):
        client, identity = mlflow.MlflowClient(), store.experiment_id(experiment)
        tags = client.get_experiment(identity).tags
        if MLFLOW_RUN_NOTE not in tags:
            client.set_experiment_tag(identity, MLFLOW_RUN_NOTE, note)
        if _release() != RELEASE:
            return False
        state = "deflate;" + base64.b64encode(zlib.compress(json.dumps(table).encode())).decode()
        if json.loads(tags.get(TAG, "{}")).get("state") != state:
            now = get_current_time_millis()
            view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": state}
            client.set_experiment_tag(identity, TAG, json.dumps(view))
        return True
    return False


def _release() -> str:
    """Say which MLflow shows the store: its server, or the one that is installed here."""
    address = mlflow.get_tracking_uri()
    if not address.startswith("http"):
        return str(mlflow.__version__)
    answer = http_request(get_default_host_creds(address), "/version", "GET", timeout=5, max_retries=0)
    return str(answer.text.strip())


def _table(columns: Sequence[str]) -> dict[str, Any]:
    """Describe a table of runs, the highest of the first column first."""
    return {
        "searchFilter": "",
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_20_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _groups(tag: str, values: Sequence[str]) -> dict[str, Any]:
    """Describe what is other in a table with a closed row for each value of a tag, with the means of its runs."""
    return {
        "searchFilter": f"tags.{tag} LIKE '%'",
        # The newest runs first: the mean of the best hundred would be no mean of them all.
        "orderByKey": "attributes.start_time",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": tag}]},
        "groupsExpanded": {f"tag.{tag}.{value}": False for value in values},
    }
