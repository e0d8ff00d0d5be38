"""The study in MLflow: one parent run with summary, plots and tables, and a child for each run of the study.

Stage ``report`` calls this. ``make study`` runs it as a command as well: it writes what MLflow lacks, in a new clone or
after ``rm mlflow.db``, and prints what the study found.
"""

import json
import re
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis
from tqdm import tqdm

from mnist_mlp import UserError, lineage, params, run_command, store, study, tracking
from mnist_mlp.params import VARIABLE, Params


def main() -> None:
    """Write what MLflow lacks, and say what the study found."""
    config = params.load()
    study.check_parameters(config)
    _check_files(lineage.read_stages(study.LOCK.read_bytes()))
    print(f"MLflow: {track(config)}")
    print(f"        {store.page(store.STUDY)}")
    print(study.in_words(json.loads(study.SUMMARY.read_text())))


def track(config: Params) -> str:
    """Make MLflow's record of the study complete. A study that is there is not written again.

    Args:
        config: what the study was made with.

    Returns:
        What came of it, for people.

    Raises:
        UserError: no MLflow store is available, or the tables are not those of a study with these parameters.
    """
    study.check_parameters(config)
    _check_files(study.recorded())
    store.connect(store.STUDY)
    values = {name: config.flat()[name] for name in VARIABLE}
    tables = [path.read_bytes() for path in (study.RUNS, study.HISTORY)]
    digest = lineage.md5(b"".join([json.dumps(values, sort_keys=True).encode(), *tables]))
    try:
        with store.lock():
            for parent in store.search(f"tags.`study.md5` = '{digest}'", experiment=store.STUDY):
                if parent.info.status == "FINISHED":
                    added = _log_results(parent.info.run_id)
                    return f"study {parent.info.run_name} {'has new results' if added else 'was complete'}"
                _delete(parent.info.run_id)  # its writer was stopped
            name = _write(config, digest, study.read(*(table.decode() for table in tables)))
            return f"study {name} is now complete"
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow refuses: {store.first_line(error)}; `make study` tries again") from None


def _check_files(stages: dict[str, Any]) -> None:
    for path, md5 in lineage.outputs(stages).items():
        if lineage.file_md5(path) != md5:
            raise UserError(f"{path} is not what the study has made; run `make study`")


def _write(config: Params, digest: str, runs: list[tuple[study.Row, study.Run]]) -> str:
    """Write the parent and a child for each run, in three requests a child."""
    client, patch, name = mlflow.MlflowClient(), lineage.patch(), tracking.run_name()
    experiment = store.experiment_id(store.STUDY)
    tags = tracking.provenance(patch) | {"study.md5": digest}
    parent = client.create_run(experiment, tags=tags, run_name=name)
    if patch:
        tracking.log_patch(parent.info.run_id, patch)
    for row, run in tqdm(runs, "MLflow", unit="run", disable=None, leave=False):
        member = study.config_of(row, config).flat()
        child = client.create_run(
            experiment,
            tags={MLFLOW_PARENT_RUN_ID: parent.info.run_id, "model.md5": run.model_md5},
            run_name=study.label(row),
        )
        history = [{"epoch": str(epoch)} | figures for epoch, figures in enumerate(run.history)]
        now = get_current_time_millis()
        client.log_batch(
            child.info.run_id,
            metrics=store.points(history) + [Metric(name, float(text), now, 0) for name, text in run.metrics.items()],
            params=[Param(name, str(member[name])) for name in (*VARIABLE, "train.seed")],
        )
        client.set_terminated(child.info.run_id, "FINISHED" if run.metrics else "FAILED")
    _log_results(parent.info.run_id)
    client.set_terminated(parent.info.run_id)
    return name


def _log_results(run_id: str) -> bool:
    """Log what stage ``report`` makes, unless the run has the same; tell whether it was new."""
    client = mlflow.MlflowClient()
    plots = sorted(study.PLOTS.glob("*.png"))
    digest = lineage.md5(b"".join(path.read_bytes() for path in (study.SUMMARY, *plots)))
    stored = {artifact.path for artifact in client.list_artifacts(run_id)}
    if client.get_run(run_id).data.tags.get("report.md5") == digest and {study.SUMMARY.name, "plots"} <= stored:
        return False
    for path in (study.SUMMARY, study.RUNS, study.HISTORY):
        client.log_artifact(run_id, str(path))
    for path in plots:
        client.log_artifact(run_id, str(path), "plots")
    client.log_artifact(run_id, "params.yaml")
    summary = json.loads(study.SUMMARY.read_text())
    for found in summary["settings"]:
        # MLflow takes no brackets in a name. What stands before a slash becomes a section of the page.
        section = re.sub(r"[^\w. -]", "_", found["setting"])
        numbers = found["accuracy"] | {"share that reaches the target": found["target"]["share"]}
        for name, value in numbers.items():
            if isinstance(value, float):
                client.log_metric(run_id, f"{section}/{name}", value)
    client.set_tag(run_id, MLFLOW_RUN_NOTE, study.in_words(summary))
    client.set_tag(run_id, "report.md5", digest)
    return True


def _delete(run_id: str) -> None:
    client = mlflow.MlflowClient()
    for child in store.search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'", experiment=store.STUDY):
        client.delete_run(child.info.run_id)
    client.delete_run(run_id)


if __name__ == "__main__":
    run_command(main)
