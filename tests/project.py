"""Copies of this repository in which tests run the real pipeline, on a net small enough to train in a second."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import yaml
from dvc.cli import main as dvc_main
from mlflow.entities import Run

from mnist_mlp import params, record

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# Neither the user's settings, such as signatures and hooks, nor the variables of a hook that runs the tests.
for variable in [name for name in os.environ if name.startswith("GIT_")]:
    del os.environ[variable]
os.environ |= {"GIT_CONFIG_GLOBAL": str(REPOSITORY / "tests/gitconfig"), "GIT_CONFIG_SYSTEM": os.devnull}
SMALL: dict[str, object] = {"model.hidden": [32], "train.epochs": 2, "train.batch_size": 250,
                            "evaluate.target_accuracy": 0.5, "study.vary": {}}  # fmt: skip
DIVERGING = 1e6  # a learning rate at which any net and optimiser does
NEVER = 1800  # seconds. Only a process that hangs takes so long, on a busy machine too
LR = params.load().train.lr
# Another value, whose results are in the cache of the fixture `tried`.
TRIED: dict[str, object] = {"train.lr": 0.05}
RESULTS = ("dvc.lock", "results/model.safetensors", "results/history.csv", "results/metrics.json",
           "results/predictions.csv", "results/plots/test_acc.png", "results/plots/wrong_digits.png")  # fmt: skip


OUTPUT = ".git/output"  # what the first `dvc repro` of the fixture `finished` has printed


def put_files(folder: Path, source: Path) -> None:
    """Put a working tree's files, and no results, in the place of those that Git has in the folder."""

    def files(tree: Path, *options: str) -> list[str]:
        listed = run(tree, "git", "ls-files", *options).stdout.split()
        return [name for name in listed if not name.startswith("results/") and not name.endswith("dvc.lock")]

    for name in files(folder) if (folder / ".git").exists() else []:
        (folder / name).unlink()
    for name in files(source, "--cached", "--others", "--exclude-standard"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)


def make(folder: Path, mnist: Path, small: bool = True, source: Path = REPOSITORY) -> Path:
    """Commit a working tree's files and no results as a repository of its own, with a small net unless told."""
    put_files(folder, source)
    (folder / "data/MNIST/raw").mkdir(parents=True, exist_ok=True)
    for file in mnist.iterdir():
        if file.suffix == "" and not file.name.startswith("."):
            shutil.copy(file, folder / "data/MNIST/raw")
    if small:
        edit(folder, SMALL)
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "git", "config", "user.name", "test")  # DVC's own Git reads no GIT_CONFIG_GLOBAL
    run(folder, "git", "config", "user.email", "test@localhost")
    commit(folder)
    return folder


def put_code(folder: Path) -> None:
    """Put the packages into a folder, so that commands work there: they do so in the folder of their code."""
    for package in ("lineage", "mnist_mlp", "stages"):
        shutil.copytree(REPOSITORY / package, folder / package)


def copy(repository: Path, folder: Path, store: bool = True) -> Path:
    """Copy a repository with its results, with or without its MLflow store."""
    left_out = () if store else ("mlflow.db", "mlruns")
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
    return folder


def commit(folder: Path) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "-m", "test")


def edit(folder: Path, values: dict[str, object]) -> None:
    """Set parameters by their dotted names."""
    path = folder / "params.yaml"
    content = yaml.safe_load(path.read_text())
    for name, value in values.items():
        section, key = name.split(".")
        content[section][key] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def environment(**more: str) -> dict[str, str]:
    """Leave out what a test run of its own, or its caller, may have set."""
    others = ("DVC_", "MLFLOW_", "ATEN_", "MAKE", "MFLAGS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | more


def run(
    folder: Path, *command: str, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user in that folder would."""
    done = subprocess.run(command, cwd=folder, env=env or environment(), capture_output=True, text=True, timeout=NEVER)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def runs(folder: Path) -> list[Run]:
    """Read the runs in the repository's own store, the newest first, but for the tutorial's."""
    return runs_at(f"sqlite:///{folder}/mlflow.db")


def runs_at(uri: str) -> list[Run]:
    mlflow.set_tracking_uri(uri)
    ours = "attributes.run_name != 'published'"
    found: list[Run] = mlflow.search_runs(
        experiment_names=[record.EXPERIMENT], filter_string=ours, output_format="list"
    )
    return found


def stages_run(output: str) -> list[str]:
    """List the stages that `dvc repro` has run, rather than skipped or taken from its cache."""
    return re.findall(r"^> python -m stages\.(\w+)$", output, re.MULTILINE)


def contents(folder: Path) -> dict[str, bytes]:
    """Read what the pipeline promises to give byte for byte."""
    return {name: (folder / name).read_bytes() for name in RESULTS}


def dvc(*command: str) -> None:
    """Run DVC in this process, in its working folder."""
    assert dvc_main(list(command)) == 0
