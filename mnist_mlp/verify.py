"""The proof: run again what made a model, and compare. ``make verify``, ``make verify MODEL=HEAD``.

For a model or run of MLflow: the run holds the commit, the changes that were not committed, the parameters and the
digest of the data that it was made from. The pipeline is run again from these, in a temporary clone with an MLflow
store of its own. Then all is compared: every epoch's figures, every file of ``dvc.lock``, the weights in the stored
model, and the probabilities that it computes for the test images.

For a Git revision no store is needed: the pipeline of that commit is run again, and every file is compared with the
commit's ``dvc.lock``.

The workspace and the store are only read. The clone uses the virtual environment that this uses. Where that is another
than the run's, a difference is followed by what differs.

Exit status: 0 for identical, 1 for different, 2 where there is no answer, and why.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

import lineage
from lineage import UserError, git, lock, run_command
from mnist_mlp import registry, store, tracking
from mnist_mlp.recipe import HISTORY, METRICS, MODEL, data

ENVIRONMENT = ("python", "torch", "mlflow", "dvc", "cpu")
NEEDED = ("git.commit", "git.patch.md5", "data.digest", "model.md5", "dvc.lock.md5")
FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, the id of an MLflow run, or a Git revision"
# The run's settings, not ours: mnist_mlp/recipe/__init__.py sets some of these, and the commit may have set others.
NOT_PASSED_ON = ("DVC_", "GIT_", "MLFLOW_", "ATEN_", "ONEDNN_", "CUBLAS_")

Values = dict[str, str]  # what is compared, by name; what comes first in a run comes first


class Proof(NamedTuple):
    """What was run again, and lines on the first difference: none if all is identical."""

    origin: str
    difference: list[str]


def main() -> None:
    """Verify one model or commit, say what came of it, and exit with the status that says so too."""
    parser = argparse.ArgumentParser(prog="python -m mnist_mlp.verify", description="Run again, and compare.")
    champion = f"models:/{registry.NAME}@{registry.CHAMPION}"
    parser.add_argument("model", nargs="?", default=champion, help=f"{FORMS}; {champion} unless you name one")
    model = parser.parse_args().model
    start = time.perf_counter()
    try:
        proof = verify_commit(model) if _is_revision(model) else verify_run(model)
    except Exception as error:  # status 1 means 'different', so whatever prevents an answer must end with 2
        text = " ".join(str(error).split())
        if not isinstance(error, UserError | MlflowException | OSError):
            text = f"{type(error).__name__}: {text}"
        parser.exit(2, f"verify: {store.first_line(text)}\n")
    if proof.difference:
        print(f"different: {proof.origin}", *proof.difference, sep="\n")
        sys.exit(1)
    print(f"identical: {proof.origin}, every figure and byte, run again in {time.perf_counter() - start:.0f} s")


def verify_commit(revision: str) -> Proof:
    """Run the pipeline of a commit again, and compare every file with the commit's ``dvc.lock``."""
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    recorded_lock, pipeline = (git.run("show", f"{commit}:{name}") for name in ("dvc.lock", "dvc.yaml"))
    stages = {} if recorded_lock.returncode else lock.locked_stages(recorded_lock.stdout, pipeline.stdout)
    recorded = _outputs(stages, f"commit {commit[:10]}")
    if forged := _forged(commit, recorded):
        return Proof(f"commit {commit[:10]}", forged)
    print(f"running commit {commit[:10]} again", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        clone = _clone(commit, Path(folder))
        _run_again(clone)
        obtained = _made(clone)
    return Proof(f"commit {commit[:10]}", _first_difference(recorded, obtained, "in dvc.lock"))


def _forged(commit: str, recorded: Values) -> list[str]:
    """Compare the results that are in Git with the commit's ``dvc.lock``: people read the former."""
    for path, md5 in recorded.items():
        content = git.run("show", f"{commit}:{path}")
        if content.returncode == 0 and lineage.md5(content.stdout) != md5:
            return [f"{path} is {lineage.md5(content.stdout)} in Git, {md5} in dvc.lock"]
    return []


def verify_run(model: str) -> Proof:
    """Run again what made a model, and compare it with its run in MLflow.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a run id.

    Raises:
        UserError: there is no such model, or its run cannot be verified.
    """
    store.open_to_read()
    try:
        run = _find(model)
    except SQLAlchemyError as error:
        raise store.refusal(mlflow.get_tracking_uri(), error) from None
    _check(run)
    origin = f"run {run.info.run_id}, commit {run.data.tags['git.commit'][:10]}"
    print(f"running again: {origin}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recorded = _recorded_values(run, Path(folder))
        recorded |= _model_hashes(model if model.startswith("models:/") else _model_uri(run))
        clone = _clone(run.data.tags["git.commit"], Path(folder))
        _put_parameters_and_changes(run, clone)
        _run_again(clone)
        obtained, again = _obtained_values(clone)
    difference = _first_difference(recorded, obtained, "in the run")
    if difference:
        theirs, ours = run.data.tags, again.data.tags
        named = [f"{name} is {theirs.get(name)} in the run, {ours.get(name)} here" for name in ENVIRONMENT]
        others = [line for name, line in zip(ENVIRONMENT, named, strict=True) if theirs.get(name) != ours.get(name)]
        difference += others or [f"the environment is the same: {', '.join(ENVIRONMENT)}"]
    return Proof(origin, difference)


def _first_difference(recorded: Values, obtained: Values, where: str) -> list[str]:
    for name in recorded | obtained:
        theirs, ours = recorded.get(name, "missing"), obtained.get(name, "missing")
        if theirs != ours:
            return [f"{name} is {theirs} {where}, {ours} here"]
    return []


def _is_revision(model: str) -> bool:
    """Tell a Git revision from a name in MLflow. A run id has 32 hexadecimal digits, a full commit 40."""
    if model.startswith("models:/") or re.fullmatch(r"[0-9a-f]{32}", model):
        return False
    if not git.has_commit(model):
        git.check()
        raise UserError(f"{model!r} is not known here; accepted are {FORMS}")
    return True


def _find(model: str) -> Run:
    client = mlflow.MlflowClient()
    if not model.startswith("models:/"):
        return _run(model)
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model)
    if not parts:
        raise UserError(f"{model} is not the name of a model; accepted are {FORMS}")
    name, alias, version = parts.groups()
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        advice = f"; {registry.advice()}" if (name, alias) == (registry.NAME, registry.CHAMPION) else ""
        raise UserError(f"{store.first_line(error)}{advice}") from None
    identity = found.tags.get(registry.RUN) or found.run_id
    if not identity:
        raise UserError(f"{model} was registered without a run, which would say where it comes from")
    return _run(identity)


def _run(identity: str) -> Run:
    try:
        return mlflow.get_run(identity)
    except MlflowException as error:
        raise UserError(f"{store.first_line(error)}; `make track` makes a run of the present results") from None


def _check(run: Run) -> None:
    """Refuse a run whose origin is not known, or is not available here."""
    tags, name = run.data.tags, f"run {run.info.run_id}"
    if mlflow.get_experiment(run.info.experiment_id).name == store.STUDY:
        raise UserError(f"{name} is one of the study, whose runs `make study-check` proves")
    if "git.commit" not in tags:
        raise UserError(f"{name} is none of the pipeline's, so nothing can be run again")
    if run.info.status != "FINISHED":
        raise UserError(f"{name} is {run.info.status}, not finished; `make track` makes a run of the present results")
    if missing := [key for key in NEEDED if key not in tags]:
        raise UserError(
            f"{name} recorded no {', '.join(missing)}; `make repro` completes the run of the present results"
        )
    if unknown := [key for key in NEEDED if tags[key] == git.UNKNOWN]:
        raise UserError(
            f"{name} does not know its {', '.join(unknown)}, because Git failed; `make track` makes a new run"
        )
    if tags["data.digest"] != data.DIGEST:
        raise UserError(f"{name} was made from {registry.OTHER_DATA}; check its commit out first: {tags['git.commit']}")
    commit = tags["git.commit"]
    if not git.has_commit(commit):
        git.check()
        raise UserError(
            f"{name} was made from commit {commit}, which is not in this repository; "
            "try `git fetch`, or `make track` for a run of the present results"
        )


def _recorded_values(run: Run, folder: Path) -> Values:
    client, identity = mlflow.MlflowClient(), run.info.run_id
    try:
        recorded_lock = tracking.download(identity, tracking.LOCK, folder)
    except (MlflowException, OSError):
        raise UserError(
            f"the files of run {identity} are lost; `make track` makes a run of the present results"
        ) from None
    history: list[dict[str, str]] = []
    names = sorted(name for name in run.data.metrics if name.endswith(("_loss", "_acc")))
    points = {name: {point.step: point.value for point in client.get_metric_history(identity, name)} for name in names}
    for epoch in sorted(points[names[0]]):
        history.append({"epoch": str(epoch)} | {name: f"{points[name][epoch]:.6f}" for name in names})
    return {
        "data.digest": run.data.tags["data.digest"],
        **_epochs(history),
        **_outputs(lock.read_stages(recorded_lock.read_bytes()), f"run {identity}"),
        "accuracy": str(run.data.metrics.get("accuracy")),
    }


def _obtained_values(clone: Path) -> tuple[Values, Run]:
    with chdir(clone):  # MLflow makes a folder for artifacts wherever it opens a store
        mlflow.set_tracking_uri(f"sqlite:///{clone}/mlflow.db")
        (again,) = store.search("tags.`model.md5` != ''")
        with HISTORY.open() as file:
            history = list(csv.DictReader(file))
        values = {
            "data.digest": again.data.tags["data.digest"],
            **_epochs(history),
            **_made(clone),
            "accuracy": str(json.loads(METRICS.read_text())["accuracy"]),
            **_model_hashes(_model_uri(again)),
        }
    return values, again


def _epochs(history: list[dict[str, str]]) -> Values:
    return {f"epoch {row['epoch']}: {name}": value for row in history for name, value in row.items() if name != "epoch"}


def _model_hashes(uri: str) -> Values:
    """Hash the weights of a stored model, and what it computes: right weights can stand in a wrong graph."""
    import safetensors.torch  # here: a refusal needs no PyTorch, which takes seconds to load
    import torch

    try:
        with tempfile.TemporaryDirectory() as copy:  # MLflow writes a file beside the model that it loads
            model = mlflow.pytorch.load_model(uri, dst_path=copy)
            weights = safetensors.torch.save(
                {name.removeprefix("net."): tensor for name, tensor in model.state_dict().items()}
            )
            with torch.no_grad():
                probabilities = model(torch.from_numpy(data.load("t10k")[0]))
    except (MlflowException, OSError, RuntimeError) as error:
        reason = store.first_line(error).partition(". ")[0]
        raise UserError(
            f"{uri}: its files are lost, damaged or unsafe ({reason}); `make track` replaces lost ones from the results"
        ) from None
    return {
        "the MD5 of the stored model's weights": lineage.md5(weights),
        "the MD5 of its probabilities for the test images": lineage.md5(probabilities.numpy().tobytes()),
    }


def _model_uri(run: Run) -> str:
    outputs = run.outputs.model_outputs if run.outputs else []
    if not outputs:
        raise UserError(f"run {run.info.run_id} has no model in MLflow; `make track` completes the run of the results")
    return f"models:/{outputs[0].model_id}"


def _outputs(stages: dict[str, Any], origin: str) -> Values:
    if not {"train", "evaluate", "plot"} <= stages.keys():
        raise UserError(f"{origin} has no dvc.lock with results of train, evaluate and plot")
    return lock.outputs(stages)


def _made(clone: Path) -> Values:
    return lock.outputs(lock.read_stages((clone / lock.LOCK).read_bytes()))


def _clone(commit: str, folder: Path) -> Path:
    """Check a commit out, without the results in it, and put the data beside."""
    clone = folder / "clone"
    _git("archive", "--output", os.devnull, commit)  # fetches the files that a partial clone lacks
    _git("clone", "--quiet", "--no-checkout", "--shared", ".", str(clone))  # with commits that are on no branch, too
    _git("-C", str(clone), "checkout", "--quiet", "--detach", commit)
    shutil.rmtree(clone / MODEL.parent, ignore_errors=True)
    for name in data.SHA256:
        if (data.RAW / name).exists():  # the stage `download` checks it, and fetches what is not right
            (clone / data.RAW).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data.RAW / name, clone / data.RAW / name)
    return clone


def _put_parameters_and_changes(run: Run, clone: Path) -> None:
    mlflow.MlflowClient().download_artifacts(run.info.run_id, "params.yaml", str(clone))
    if run.data.tags["git.patch.md5"] == tracking.CLEAN:
        return
    patch = tracking.download(run.info.run_id, tracking.PATCH, clone.parent)
    if lineage.md5(patch.read_bytes()) != run.data.tags["git.patch.md5"]:
        raise UserError(f"run {run.info.run_id}: its {patch.name} is damaged")
    _git("-C", str(clone), "apply", "--whitespace=nowarn", str(patch))


def _run_again(clone: Path) -> None:
    """Run every stage of the pipeline in the clone, but for the one that would register the model."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{clone}/mlflow.db",
        "DVC_SITE_CACHE_DIR": str(clone / ".dvc/site"),
    }
    stages = lock.read_stages((clone / "dvc.yaml").read_bytes()).keys() - {lock.TRACK}
    (clone / lock.LOCK).unlink(missing_ok=True)  # what is in it afterwards has been made here
    # By --force and --no-commit nothing is taken from, or put into, a cache that this user's repositories may share.
    # By --quiet DVC does not ask to commit or push what it made; the stages still print their lines.
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--force", "--no-commit", *stages]
    if subprocess.run(command, cwd=clone, env=environment, check=False).returncode:
        raise UserError("the pipeline fails when run again; the reason is above")


def _git(*arguments: str) -> str:
    done = git.run(*arguments)
    if done.returncode:
        raise UserError(f"git {arguments[0]} fails: {done.stderr.decode(errors='replace')}")
    return done.stdout.decode(errors="replace").strip()


if __name__ == "__main__":
    run_command(main)
