"""What users do with the pipeline, as they do it: real DVC, real MLflow store, real MNIST."""

import ast
import json
import pickle
import shutil
import signal
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml

import lineage
from lineage import UserError
from mnist_mlp import params, verify
from mnist_mlp.published import published_history
from mnist_mlp.recipe import data, net, training
from mnist_mlp.recipe.history import FIGURES
from tests import project, stopping

ONE_STAGE = ("dvc", "repro", "--force", "--single-item")


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository to do things to; its MLflow store is empty."""
    return project.copy(finished, tmp_path / "repository", store=False)


def test_one_pipeline_run_is_one_mlflow_run_with_the_data_the_curves_and_the_plots(finished: Path) -> None:
    (run,) = project.runs(finished)
    assert run.data.metrics.keys() >= {"accuracy", *FIGURES}
    lock = yaml.safe_load((finished / "dvc.lock").read_text())["stages"]
    history = np.genfromtxt(finished / "results/history.csv", delimiter=",", names=True)
    metrics = json.loads((finished / "results/metrics.json").read_text())
    client = mlflow.MlflowClient()

    assert run.info.status == "FINISHED"
    assert run.data.tags["model.md5"] == lock["train"]["outs"][1]["md5"]
    assert {"python", "torch", "cpu"} <= run.data.tags.keys()
    assert run.data.params["model.hidden"] == str(project.SMALL["model.hidden"])
    assert run.data.params["train.lr"] == str(project.LR)
    assert run.inputs is not None
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == run.data.tags["data.digest"] == data.DIGEST
    for name in ("train_loss", "train_acc", "test_loss", "test_acc"):
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert logged == dict(enumerate(history[name]))
    assert run.data.metrics["accuracy"] == metrics["accuracy"] > 0.5
    table = client.load_table(run.info.experiment_id, "per_digit.json", [run.info.run_id])
    assert list(table["recall"]) == pytest.approx(metrics["recall"])
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"params.yaml", "dvc.lock.yaml", "metrics.json", "per_digit.json", "plots"}
    plots = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "plots")]
    assert plots == sorted(f"plots/{path.name}" for path in (finished / "results/plots").glob("*.png"))
    for path in ("metrics.json", *plots):
        content = Path(client.download_artifacts(run.info.run_id, path)).read_bytes()
        assert content == (finished / "results" / path).read_bytes()
    description = run.data.tags["mlflow.note.content"]
    assert f"**{metrics['accuracy']:.2%}**" in description
    assert "target 50.00% reached" in description
    assert all(f"published {row['test_acc']:.4%}" in description for row in published_history()[-1:])


@pytest.mark.recipe
def test_the_runs_page_shows_one_accuracy_and_the_curves_and_what_is_published(finished: Path) -> None:
    (run,) = project.runs(finished)
    assert sorted(run.data.metrics) == ["accuracy", *sorted(FIGURES)]
    assert run.data.metrics["accuracy"] > 0.9
    assert len(list((finished / "results/plots").glob("*.png"))) == 6
    assert "published 97.7453%" in run.data.tags["mlflow.note.content"]


def test_the_tracked_model_takes_raw_images_and_predicts_what_the_pipeline_did(finished: Path, mnist: Path) -> None:
    (run,) = project.runs(finished)
    assert run.outputs is not None
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    model = mlflow.pyfunc.load_model(uri)
    probabilities = model.predict(data.load("t10k", mnist)[0])
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    assert probabilities.shape == (data.SIZES["t10k"], data.CLASSES)
    assert np.array_equal(probabilities.argmax(1), predictions["predicted"])
    assert np.allclose(probabilities.max(1), predictions["probability"], atol=2e-6)
    weights = lineage.md5((finished / "results/model.safetensors").read_bytes())
    assert verify.hash_model(uri)["the MD5 of the stored model's weights"] == weights
    files = list((finished / "mlruns").rglob("*"))
    assert any(file.suffix == ".pt2" for file in files)
    assert not any(file.suffix in (".pkl", ".pickle", ".pth") for file in files)


def test_metrics_hold_what_the_predictions_say(finished: Path) -> None:
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    metrics = json.loads((finished / "results/metrics.json").read_text())
    right = predictions["actual"] == predictions["predicted"]
    assert metrics["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    size = params.load(finished / "params.yaml").evaluate.batch_size
    batches = [right[start : start + size].mean() for start in range(0, len(right), size)]
    assert metrics["batch_mean_accuracy"] == pytest.approx(np.mean(batches), abs=1e-6)
    assert np.sum(metrics["confusion"]) == len(right) == data.SIZES["t10k"]
    for digit in range(data.CLASSES):
        taken, given = predictions["predicted"] == digit, predictions["actual"] == digit
        assert metrics["precision"][digit] == pytest.approx((taken & given).sum() / taken.sum(), abs=1e-6)
        assert metrics["recall"][digit] == pytest.approx((taken & given).sum() / given.sum(), abs=1e-6)


@pytest.mark.full
def test_another_folder_time_and_number_of_threads_give_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    project.run(tmp_path, "git", "clone", "--quiet", str(finished), str(clone))
    shutil.copytree(finished / "data/MNIST/raw", clone / "data/MNIST/raw", dirs_exist_ok=True)
    project.run(clone, "dvc", "repro", env=project.environment(OMP_NUM_THREADS="4"))
    assert project.contents(clone) == project.contents(finished)
    assert project.run(clone, "git", "status", "--porcelain").stdout == ""
    (run,) = project.runs(clone)
    assert "accuracy" in run.data.metrics  # dvc.lock says that `track` has run, but not in this clone


@pytest.mark.parametrize(
    ("edit", "due"),
    [
        ({}, []),
        ({"plot.dpi": 120}, ["plot", "track"]),
        ({"evaluate.target_accuracy": 0.6}, ["evaluate", "track"]),
        ({"train.lr": 0.05}, ["train", "track"]),
        ({"data.timeout": 5.0}, ["download", "track"]),
        ({"train.seed": 7}, ["train", "track"]),
        ({"train.threads": 2}, ["train", "evaluate", "track"]),
    ],
)
def test_an_edit_runs_only_what_it_touches(repository: Path, edit: dict[str, object], due: list[str]) -> None:
    """And those behind it, if its output changes, which a dry run cannot know."""
    project.edit(repository, edit)
    output = project.run(repository, "dvc", "repro", "--dry").stdout
    assert [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")] == due


@pytest.mark.parametrize(
    "path",
    ["lineage/git.py", "mnist_mlp/params.py", "mnist_mlp/study/words.py", "mnist_mlp/verify.py", "stages/track.py"],
)
def test_a_comment_outside_of_the_recipe_makes_no_training_due(repository: Path, path: str) -> None:
    (repository / path).write_text((repository / path).read_text() + "# read by nobody\n")
    output = project.run(repository, "dvc", "repro", "--dry").stdout
    assert [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")] == ["track"]


def test_files_of_editors_and_systems_make_no_stage_due_and_are_no_mistake(repository: Path) -> None:
    for folder in ("mnist_mlp", data.RAW):
        for name in (".DS_Store", "Thumbs.db", "data.py~", ".data.py.swp", "data.py.orig", "data.py.rej"):
            (repository / folder / name).touch()
        for name in (".ipynb_checkpoints", ".idea", ".vscode"):
            (repository / folder / name).mkdir()
            (repository / folder / name / "file").touch()
    assert project.run(repository, "dvc", "status", "dvc.yaml").stdout == "Data and pipelines are up to date.\n"
    assert project.run(repository, "git", "status", "--porcelain").stdout == ""
    project.run(repository, *ONE_STAGE, "download")


@pytest.mark.recipe
def test_dvc_freeze_and_unfreeze_leave_the_pipelines_files_as_they_were(repository: Path) -> None:
    """They are in DVC's own layout, so that `git diff` shows only what somebody meant to change."""
    files = [repository / path for path in ("dvc.yaml", "study/dvc.yaml")]
    before = [file.read_text() for file in files]
    stages = [f"{file}:{name}" for file in files for name in yaml.safe_load(file.read_text())["stages"]]
    project.run(repository, "dvc", "freeze", *stages)
    assert all("frozen: true" in file.read_text() for file in files)
    project.run(repository, "dvc", "unfreeze", *stages)
    assert [file.read_text() for file in files] == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"train.lr": "fast"}, "params.yaml: train.lr is 'fast': input should be a valid number"),
        pytest.param(
            {"train.lr": project.DIVERGING}, "train: diverged in epoch 0: the loss is", marks=pytest.mark.full
        ),
    ],
)
def test_a_failing_stage_says_why_in_one_line_and_the_last_results_come_back(
    finished: Path, repository: Path, edit: dict[str, object], message: str
) -> None:
    good = (repository / "params.yaml").read_bytes()
    project.edit(repository, edit)
    done = project.run(repository, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "when this is mended, `dvc repro` makes what DVC has removed, or takes it from its cache" in done.stderr
    assert "Traceback" not in done.stderr
    for run in project.runs(repository):  # where one was begun
        assert (run.info.status, run.data.tags["mlflow.note.content"][:20]) == ("FAILED", "Failed: diverged in ")

    (repository / "params.yaml").write_bytes(good)
    assert project.stages_run(project.run(repository, "dvc", "repro").stdout) == []
    assert project.contents(repository) == project.contents(finished)


@pytest.mark.recipe
def test_a_net_that_this_machine_cannot_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^params.yaml: model.hidden \[100000, 100000\] needs at least"):
        net.mlp([100_000, 100_000])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^params.yaml: train.device is 'cuda', but PyTorch finds no usable GPU here"):
        training.load(params.load().replaced({"train.device": "cuda"}))


@pytest.mark.parametrize("library", ["torch", "numpy"])  # which raise errors of different kinds
def test_too_little_memory_is_said_in_one_line_with_what_to_lower(repository: Path, library: str) -> None:
    stage = f"import {library}, lineage; lineage.run_command(lambda: {library}.empty(1 << 50))"
    done = project.run(repository, sys.executable, "-c", stage, check=False)
    line = "-c: too little memory; lower the sizes of layers and batches in params.yaml\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_a_stage_that_is_run_as_a_file_says_how_to_run_it(tmp_path: Path) -> None:
    """Where .venv was made by `make setup`, which lets Python find the project from everywhere."""
    command, environment = project.REPOSITORY / "stages/plot.py", {"PYTHONPATH": str(project.REPOSITORY)}
    done = project.run(tmp_path, sys.executable, str(command), check=False, env=project.environment(**environment))
    assert (done.returncode, done.stderr) == (2, "plot: run it as `python -m stages.plot`, in the folder of dvc.yaml\n")


def test_each_stage_declares_every_file_that_decides_a_byte_of_its_results() -> None:
    """The other files that it may import read and check the parameters, talk to Git and MLflow, or spread the work."""
    root = project.REPOSITORY
    read_or_log = ("__init__", "params", "published", "record")
    others = {*root.glob("lineage/*.py"), *(root / f"mnist_mlp/{name}.py" for name in read_or_log)}
    others |= {root / "stages/__init__.py"}
    spread = set(root.glob("mnist_mlp/study/*.py"))
    pipelines = [yaml.safe_load((root / path).read_text()) for path in ("dvc.yaml", "study/dvc.yaml")]
    for name, stage in (pipelines[0]["stages"] | pipelines[1]["stages"]).items():
        declared = {file for dep in stage["deps"] for file in (root / dep, *(root / dep).rglob("*.py"))}
        imported = imports(f"stages.{name}")
        assert len(imported) > 2
        allowed = others - {root / "mnist_mlp/published.py"} if name == "plot" else others
        assert imported <= declared | allowed | (spread if name == "replicate" else set()), name
        assert "requirements.txt" in stage["deps"], name


def test_imports_run_down_only_from_stages_by_the_package_to_the_link() -> None:
    layers = ["lineage", "mnist_mlp/recipe", "mnist_mlp", "stages"]
    for level, folder in enumerate(layers[:-1]):
        for file in (project.REPOSITORY / folder).rglob("*.py"):
            imported = imports(".".join(file.relative_to(project.REPOSITORY).with_suffix("").parts))
            folders = {path.relative_to(project.REPOSITORY).parts[0] for path in imported}
            assert folders <= {layer.partition("/")[0] for layer in layers[: level + 1]}, file
    for file in (project.REPOSITORY / "mnist_mlp/recipe").glob("*.py"):
        imported = imports(f"mnist_mlp.recipe.{file.stem}")
        package = {path for path in imported if "mnist_mlp" in path.parts and "recipe" not in path.parts}
        assert package <= {project.REPOSITORY / "mnist_mlp/__init__.py"}, file
    modules = ", ".join(f"lineage.{file.stem}" for file in project.REPOSITORY.glob("lineage/[!_]*.py"))
    script = f"import sys, {modules}; print(*{{'torch', 'mnist_mlp'}} & sys.modules.keys())"
    assert project.run(project.REPOSITORY, sys.executable, "-c", script).stdout == "\n"


def imports(module: str, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """Add the project's files that a module imports, also inside of a function or by way of another module."""
    path = project.REPOSITORY / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if file in found or not file.exists():
        return found
    found |= {file}
    names = [module.rpartition(".")[0]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parent = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += parent + [".".join([*parent, alias.name]) for alias in node.names]
    for name in names:
        found = imports(name, found)
    return found


@pytest.mark.full
@pytest.mark.parametrize(
    ("output", "command"),
    [
        ("results/history.csv", [sys.executable, "-m", "stages.train"]),
        ("results/metrics.json", [sys.executable, "-m", "stages.evaluate"]),
        ("results/plots/test_acc.png", [*ONE_STAGE, "plot"]),
        ("results/model.safetensors", [*ONE_STAGE, "train"]),
        (f"{data.RAW}/t10k-labels-idx1-ubyte", [*ONE_STAGE, "download"]),
    ],
)
def test_killed_in_the_middle_of_a_write_no_output_is_torn_and_the_next_run_gives_the_same_bytes(
    finished: Path, repository: Path, mirror: Path, output: str, command: list[str]
) -> None:
    names = [*project.RESULTS, *(f"{data.RAW}/{name}" for name in data.SHA256)]
    whole = {name: (finished / name).read_bytes() for name in names}
    good = (repository / "params.yaml").read_bytes()
    if command[-1] == "download":
        (repository / output).unlink()
        project.edit(repository, {"data.mirrors": [f"file://{mirror}"]})
    assert stopping.in_write(repository, output, signal.SIGKILL, *command) == -signal.SIGKILL
    for name, content in whole.items():
        path = repository / name
        assert path.read_bytes() == content if path.exists() else command[0] == "dvc", name  # it removes the old ones
    (repository / "params.yaml").write_bytes(good)
    project.run(repository, "dvc", "repro", "plot")
    assert project.contents(repository) == project.contents(finished)
    assert project.run(repository, "git", "status", "--porcelain").stdout == ""


@pytest.mark.full
def test_no_run_is_left_running(repository: Path) -> None:
    """Interrupted politely it is marked at once; after `kill -9`, by the next that comes to the store."""
    train = (sys.executable, "-m", "stages.train")
    project.edit(repository, {"train.epochs": 1000})
    assert stopping.after_line(repository, "epoch  0", signal.SIGKILL, *train) == -signal.SIGKILL
    assert [run.info.status for run in project.runs(repository)] == ["RUNNING"]
    assert stopping.after_line(repository, "epoch  0", signal.SIGTERM, *train) == 130
    assert [run.info.status for run in project.runs(repository)] == ["KILLED", "KILLED"]

    training = repository / "mnist_mlp/recipe/training.py"
    training.write_text(
        training.read_text().replace(
            "        yield figures", '        assert not epoch, "a bug"\n        yield figures'
        )
    )
    done = project.run(repository, *train, check=False)
    assert "AssertionError: a bug" in done.stderr
    failed, *killed = project.runs(repository)
    assert [run.info.status for run in (failed, *killed)] == ["FAILED", "KILLED", "KILLED"]
    assert len(mlflow.MlflowClient().get_metric_history(failed.info.run_id, "test_acc")) == 1


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_weights_that_are_damaged_malicious_or_of_another_net_are_refused(finished: Path, tmp_path: Path) -> None:
    weights = (finished / "results/model.safetensors").read_bytes()
    hidden = params.load(finished / "params.yaml").model.hidden
    for content in (weights[:-100], pickle.dumps(Trap(tmp_path / "trap"))):
        with pytest.raises(UserError, match="it is not a whole safetensors file"):
            net.load_weights(net.mlp(hidden), content, "it")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="it holds the weights of another net"):
        net.load_weights(net.mlp([width + 1 for width in hidden]), weights, "it")
    net.load_weights(net.mlp(hidden), weights, "it")


def test_damaged_data_are_refused(mnist: Path, tmp_path: Path) -> None:
    for name in data.SHA256:
        shutil.copy(mnist / name, tmp_path)
    with (tmp_path / "t10k-images-idx3-ubyte").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged")
    with pytest.raises(UserError, match=r"^\S*t10k-images-idx3-ubyte is damaged"):
        data.load("t10k", tmp_path)


def test_nothing_calls_home(finished: Path) -> None:
    for option in ("core.analytics", "core.check_update"):
        assert project.run(finished, "dvc", "config", option).stdout.strip() == "false"
    script = "import lineage.store, mlflow.telemetry.utils as t; print(t.is_telemetry_disabled())"
    assert project.run(finished, sys.executable, "-c", script).stdout.strip() == "True"
