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

from lineage import ROOT
from mnist_mlp import store

# MLflow keeps named views of a table in tags of the experiment, in a format that is documented nowhere. This release
# is the one with which we looked at ours; with another, no view is better than a broken one.
RELEASE = "3.17.2"
VIEW = "results"
TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = ("metrics.`accuracy`", "metrics.`test_acc`", "metrics.`test_loss`", "params.`train.lr`",
           "params.`train.epochs`", "params.`train.seed`")  # fmt: skip
CLICK = "No runs here? Click *Model training* once."
NOTES = {
    store.EXPERIMENT: f"{CLICK} A run is one state of `dvc.lock`; `{store.PUBLISHED_RUN}` is the tutorial's.",
    store.STUDY: f"{CLICK} Each study has a row for each setting, and MLflow loads 100 runs at a time: after "
    f"*Load more*, the means are those of all runs, and `{store.PUBLISHED_RUN}` is the tutorial's.",
}


def lead(experiment: str, settings: Sequence[str] = ()) -> str:
    """Prepare the page of an experiment in the store that is open, and say how to open it.

    Args:
        experiment: its name.
        settings: the study's, each of which becomes a row; none for the pipeline's runs.

    Returns:
        Lines for people; the address is the last.
    """
    view = f"&viewStateShareKey={VIEW}" if _prepare(experiment, settings) else ""
    runs = f"#/experiments/{store.experiment_id(experiment)}/runs?workflowType=machine_learning{view}"
    if store.CHOSEN.startswith("http"):
        return f"to see it, open\n{store.first_line(store.CHOSEN).rstrip('/')}/{runs}"
    other = ' --backend-store-uri "$MLFLOW_TRACKING_URI"' if store.CHOSEN else ""
    program = Path(sys.executable).with_name("mlflow")
    start = quote(str(program.relative_to(ROOT) if program.is_relative_to(ROOT) else program))
    return f"to see it: cd {quote(str(ROOT))} && {start} ui{other}\nhttp://127.0.0.1:5000/{runs}"


def _prepare(experiment: str, settings: Sequence[str]) -> bool:
    """Write note and view, unless they are there; tell if there is a view. Without them a run is as good as with."""
    with suppress(MlflowException, OSError, ValueError):
        client, identity = mlflow.MlflowClient(), store.experiment_id(experiment)
        tags = client.get_experiment(identity).tags
        if MLFLOW_RUN_NOTE not in tags:
            client.set_experiment_tag(identity, MLFLOW_RUN_NOTE, NOTES[experiment])
        if _release() != RELEASE:
            return False
        state = "deflate;" + base64.b64encode(zlib.compress(json.dumps(_table(settings)).encode())).decode()
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


def _table(settings: Sequence[str]) -> dict[str, Any]:
    """Describe a table: the best accuracy first, or a closed row for each setting of a study, with its means."""
    table: dict[str, Any] = {
        "searchFilter": "",
        "orderByKey": "metrics.`accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": COLUMNS,
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
    if not settings:
        return table
    key = {"mode": "tag", "groupByData": store.SETTING}
    return table | {
        # The newest runs first: the mean of the best hundred would be no mean of the study.
        "searchFilter": f"tags.{store.SETTING} LIKE '%'",
        "orderByKey": "attributes.start_time",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [key]},
        "groupsExpanded": {f"tag.{store.SETTING}.{setting}": False for setting in settings},
    }
