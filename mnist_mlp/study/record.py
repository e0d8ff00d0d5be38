"""The study in MLflow: one parent run with summary, plots and tables, and a child for each run of the study.

Stage ``report`` calls this. ``make study`` runs it as a command as well: it writes what MLflow lacks, in a new clone or
after ``rm mlflow.db``, and prints what the study found.
"""

import json
import statistics

import mlflow
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from mlflow.utils.time import get_current_time_millis
from tqdm import tqdm

import lineage
from lineage import git, lock, run_command, runs, store
from mnist_mlp import params, record
from mnist_mlp.params import Params
from mnist_mlp.recipe import data
from mnist_mlp.recipe.params import VARIABLE
from mnist_mlp.study import plan, words


def main() -> None:
    """Write what MLflow lacks, and say what the study found."""
    config = params.load()
    plan.check_parameters(config)
    plan.check_files(lock.read_stages(plan.LOCK.read_bytes()))
    name, outcome = track(config)
    trained = plan.read(plan.RUNS.read_text(), plan.HISTORY.read_text())
    settings = dict.fromkeys(_setting(row, name) for row, _ in trained)
    print(f"MLflow: {name} {outcome}\n{record.lead_to_study(list(settings))}")
    print(words.in_words(json.loads(plan.SUMMARY.read_text())))


@store.in_one_line("make study")
def track(config: Params) -> tuple[str, str]:
    """Make MLflow's record of the study complete. A study that is there is not written again.

    Args:
        config: what the study was made with.

    Returns:
        The study's name in MLflow, and what came of it, for people.

    Raises:
        UserError: no MLflow store is available, or the tables are not those of a study with these parameters.
    """
    plan.check_parameters(config)
    plan.check_files(plan.recorded())
    store.connect(record.STUDY)
    record.publish(record.STUDY)
    values = {name: config.flat()[name] for name in VARIABLE}
    tables = [path.read_bytes() for path in (plan.RUNS, plan.HISTORY)]
    digest = lineage.md5(b"".join([json.dumps(values, sort_keys=True).encode(), *tables]))
    with store.lock():
        for parent in store.search(record.STUDY, f"tags.`study.md5` = '{digest}'"):
            if parent.info.status == "FINISHED":
                added = _log_results(parent.info.run_id)
                return parent.info.run_name, "has new results" if added else "was complete"
            _delete(parent.info.run_id)  # its writer was stopped
        return _write(config, digest, plan.read(*(table.decode() for table in tables))), "is now complete"


def _write(config: Params, digest: str, trained: list[tuple[plan.Row, plan.Outcome]]) -> str:
    """Write the parent and a child for each run, in three requests a child."""
    client, patch = mlflow.MlflowClient(), git.patch()
    name = f"study of {len(trained)}, {digest[:7]}"
    experiment = store.experiment_id(record.STUDY)
    tags = runs.provenance(patch) | record.TAGS | {runs.DATA: data.DIGEST, "study.md5": digest}
    parent = client.create_run(experiment, tags=tags, run_name=name)
    values = {name: config.flat()[name] for name in VARIABLE} | config.study.vary
    client.log_batch(parent.info.run_id, params=[Param(key, str(value)) for key, value in values.items()])
    if patch:
        runs.log_patch(parent.info.run_id, patch)
    by_seed = sorted(trained, key=lambda found: int(found[0]["seed"]))  # MLflow's page loads the first of each setting
    for row, run in tqdm(by_seed, "MLflow", unit="run", disable=None, leave=False):
        member = plan.config_of(row, config).flat()
        child = client.create_run(
            experiment,
            tags={
                MLFLOW_PARENT_RUN_ID: parent.info.run_id,
                runs.MODEL: run.model_md5,
                record.SETTING: _setting(row, name),
            },
            run_name=plan.label(row),
        )
        history = [{"epoch": str(epoch)} | figures for epoch, figures in enumerate(run.history)]
        now = get_current_time_millis()
        client.log_batch(
            child.info.run_id,
            metrics=runs.points(history) + [Metric(name, float(text), now, 0) for name, text in run.metrics.items()],
            params=[Param(name, str(member[name])) for name in (*VARIABLE, "train.seed")],
        )
        # It was trained before, so from start to end no time has passed.
        status = "FINISHED" if run.metrics else "FAILED"
        client.set_terminated(child.info.run_id, status, end_time=child.info.start_time)
    _log_results(parent.info.run_id)
    client.set_terminated(parent.info.run_id, end_time=parent.info.start_time)
    return name


def _setting(row: plan.Row, name: str) -> str:
    """Name the values that a run has in a study, which is a row of MLflow's table."""
    values = plan.label(plan.varied(row))
    return f"{values} ({name})" if values else name


def _log_results(run_id: str) -> bool:
    """Log what stage ``report`` makes, unless the run has the same; tell whether it was new."""
    client = mlflow.MlflowClient()
    plots = sorted(plan.PLOTS.glob("*.png"))
    digest = lineage.md5(b"".join(path.read_bytes() for path in (plan.SUMMARY, *plots)))
    stored = {artifact.path for artifact in client.list_artifacts(run_id)}
    if client.get_run(run_id).data.tags.get("report.md5") == digest and {plan.SUMMARY.name, "plots"} <= stored:
        return False
    for path in (plan.SUMMARY, plan.RUNS, plan.HISTORY):
        client.log_artifact(run_id, str(path))
    for path in plots:
        client.log_artifact(run_id, str(path), "plots")
    client.log_artifact(run_id, "params.yaml")
    summary = json.loads(plan.SUMMARY.read_text())
    means = [found["accuracy"]["mean"] for found in summary["settings"] if found["accuracy"]["mean"] is not None]
    if means:
        client.log_metric(run_id, "accuracy", statistics.mean(means))
    client.set_tag(run_id, MLFLOW_RUN_NOTE, words.in_words(summary))
    client.set_tag(run_id, "report.md5", digest)
    return True


def _delete(run_id: str) -> None:
    client = mlflow.MlflowClient()
    for child in store.search(record.STUDY, f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'"):
        client.delete_run(child.info.run_id)
    client.delete_run(run_id)


if __name__ == "__main__":
    run_command(main)
