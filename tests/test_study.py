"""The study: many seeds and settings, by Dask, each run like the pipeline's own, and none trained twice."""

import csv
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import distributed
import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from mlflow.entities import Run

import lineage
from lineage import UserError, registry, runs, store
from mnist_mlp import params, pictures, record
from mnist_mlp.published import PUBLISHED
from mnist_mlp.recipe import data, net, training
from mnist_mlp.recipe.history import FIGURES
from mnist_mlp.recipe.params import VARIABLE
from mnist_mlp.study import check, cluster, plan, words
from mnist_mlp.study import record as study_record
from stages import evaluate, replicate, report, track, train
from tests import project
from tests.conftest import Call, Make

ROOT = Path(__file__).parents[1]
STUDY = ("dvc", "repro", "study/dvc.yaml")
REPLICATE = (sys.executable, "-m", "stages.replicate")
CHECK = (sys.executable, "-m", "mnist_mlp.study.check")
TRACK = (sys.executable, "-m", "mnist_mlp.study.record")
full = pytest.mark.full
SEEDS = 3
HELD_OUT = data.SIZES["train"] // 12
OTHER_ARITHMETIC = "import torch\ntorch.nn.ReLU = torch.nn.LeakyReLU\n"


@pytest.fixture(scope="session")
def studied(finished: Path, once: Make) -> Path:
    """A repository after its first study, all committed. Not to be changed: copy it."""

    def make(folder: Path) -> None:
        project.copy(finished, folder)
        project.edit(folder, {"study.seeds": SEEDS})
        project.run(folder, *STUDY)
        project.commit(folder)

    return once("studied", make)


@pytest.fixture
def repository(studied: Path, tmp_path: Path) -> Path:
    """A copy of that to do things to."""
    return project.copy(studied, tmp_path / "repository")


@pytest.fixture
def inside(
    repository: Path, enter: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], str]:
    """Work in that copy, where runs are trained in this process, one after the other; run `replicate` for its output.

    The fixture ``studied`` shows that Dask's processes give the same.
    """
    enter(repository)
    monkeypatch.setattr(replicate, "KEPT", repository / "study/runs")

    def run_all(configs: Sequence[params.Params]) -> Iterator[tuple[int, plan.Outcome]]:
        yield from ((index, cluster.train_run(config)) for index, config in enumerate(configs))

    def run() -> str:
        capsys.readouterr()
        for path in replicate.TABLES:  # as DVC does
            path.unlink(missing_ok=True)
        replicate.main()
        return capsys.readouterr().out

    monkeypatch.setattr(cluster, "run_all", run_all)
    return run


def rows(folder: Path, path: Path = plan.RUNS) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / path).read_text().splitlines()))


def outcomes(folder: Path) -> list[plan.Outcome]:
    return [run for _, run in plan.read(*((folder / path).read_text() for path in (plan.RUNS, plan.HISTORY)))]


def forget(folder: Path) -> None:
    """Remove what the study has kept and made, and its commit, as if it had never run."""
    shutil.rmtree(folder / "study/runs", ignore_errors=True)
    project.run(folder, "git", "rm", "-r", "--quiet", "results/study", "study/dvc.lock")
    project.run(folder, "git", "commit", "--quiet", "-m", "test")


def trained(output: str) -> tuple[int, int]:
    """Read how many runs a study has, and how many of them it has trained."""
    (found,) = re.findall(r"^(\d+) runs, (\d+) of them to train$", output, re.MULTILINE)
    return int(found[0]), int(found[1])


@pytest.mark.recipe
def test_the_committed_study_holds_the_pipelines_own_run() -> None:
    """Seed 42: the same model as dvc.lock's, and the same epochs as results/history.csv."""
    (run,) = [row for row in rows(ROOT) if row["seed"] == "42"]
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    assert run["model_md5"] in {out["md5"] for out in lock["train"]["outs"]}
    epochs = [",".join(list(row.values())[1:]) for row in rows(ROOT, plan.HISTORY) if row["seed"] == "42"]
    assert epochs == (ROOT / "results/history.csv").read_text().splitlines()[1:]
    assert float(run["accuracy"]) == json.loads((ROOT / "results/metrics.json").read_text())["accuracy"]
    assert [int(row["seed"]) for row in rows(ROOT)] == list(range(1, params.load(ROOT / "params.yaml").study.seeds + 1))
    assert list(run) == ["seed", "accuracy", "batch_mean_accuracy", "loss", "model_md5"]


def test_a_run_of_the_study_is_what_the_pipeline_gives_for_its_seed(finished: Path) -> None:
    run = cluster.train_run(params.load(finished / "params.yaml"))
    metrics = json.loads((finished / "results/metrics.json").read_text())
    assert [float(run.metrics[name]) for name in plan.METRICS] == [metrics[name] for name in plan.METRICS]
    assert run.model_md5 == lineage.md5((finished / "results/model.safetensors").read_bytes())
    epochs = [f"{epoch}," + ",".join(row.values()) for epoch, row in enumerate(run.history)]
    assert epochs == (finished / "results/history.csv").read_text().splitlines()[1:]


def test_a_worker_is_checked_by_the_net_that_it_is_to_train(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of one's own may need as many widths as `model.hidden` has."""
    mlp, asked = net.mlp, []

    def spy(hidden: list[int]) -> torch.nn.Module:
        asked.append(hidden)
        return mlp(hidden)

    monkeypatch.setattr(net, "mlp", spy)
    config = params.load(ROOT / "params.yaml")
    hidden = [width + 1 for width in config.model.hidden]
    cluster.fingerprint(config.replaced({"model.hidden": hidden}))
    assert asked == [hidden]


def due(folder: Path, pipeline: str) -> list[str]:
    output = project.run(folder, "dvc", "repro", pipeline, "--dry").stdout
    return re.findall(r"^Running stage '(?:study/dvc.yaml:)?(\w+)'", output, re.MULTILINE)


def test_the_two_pipelines_do_not_run_each_other(repository: Path) -> None:
    project.edit(repository, {"study.seeds": SEEDS + 1, "train.seed": 7})
    assert due(repository, "dvc.yaml") == ["train", "track"]
    project.edit(repository, {"study.seeds": SEEDS, "plot.dpi": 90})
    assert due(repository, "study/dvc.yaml") == ["report"]


def test_words_colours_and_published_figures_make_no_run_due(repository: Path) -> None:
    for path in ("lineage/git.py", "mnist_mlp/pictures.py", "mnist_mlp/study/words.py", "mnist_mlp/study/record.py"):
        (repository / path).write_text((repository / path).read_text() + "# read by nobody\n")
    (repository / PUBLISHED).write_text("")
    assert due(repository, "study/dvc.yaml") == ["report"]


def test_no_run_is_trained_twice(repository: Path, inside: Callable[[], str]) -> None:
    """Neither with more seeds, nor with settings of which one is known, nor in a clone, which has only the tables."""
    before = plan.HISTORY.read_text()
    next(Path("study/runs").glob("*.json")).unlink()
    assert trained(inside()) == (SEEDS, 0)
    shutil.rmtree("study/runs")
    project.edit(repository, {"study.seeds": 1})
    assert trained(inside()) == (1, 0)
    project.run(repository, "git", "checkout", "--quiet", ".")
    project.edit(repository, {"study.seeds": SEEDS + 1})
    assert trained(inside()) == (SEEDS + 1, 1)
    assert plan.HISTORY.read_text().startswith(before)
    other = project.LR / 2
    project.edit(repository, {"study.vary": {"train.lr": [other, project.LR]}, "study.seeds": 2})
    assert trained(inside()) == (4, 2)
    assert [(row["train.lr"], row["seed"]) for row in rows(repository)] == [
        (str(other), "1"), (str(other), "2"), (str(project.LR), "1"), (str(project.LR), "2")
    ]  # fmt: skip


def test_runs_of_other_code_or_parameters_are_not_used(repository: Path, inside: Callable[[], str]) -> None:
    ((name, value),) = project.TRIED.items()
    before = params.load().flat()[name]
    project.edit(repository, {"study.seeds": 1, name: value})
    assert trained(inside()) == (1, 1)
    project.edit(repository, {name: before})
    code = repository / "mnist_mlp/recipe/net.py"
    code.write_text(code.read_text() + "# other code\n")
    assert trained(inside()) == (1, 1)


@full
def test_runs_of_another_arithmetic_are_not_used(
    repository: Path, inside: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those that are kept nor those in Git, of which the first diverged and so proves nothing."""
    project.edit(repository, {"study.vary": {"train.lr": [project.DIVERGING, project.LR]}, "study.seeds": 1})
    inside()
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:replicate")
    project.commit(repository)
    monkeypatch.setattr(torch.nn, "ReLU", torch.nn.LeakyReLU)
    assert trained(inside()) == (2, 2)
    shutil.rmtree(repository / "study/runs")
    assert trained(inside()) == (2, 2)


def test_tables_that_their_lock_does_not_record_are_not_used(repository: Path, inside: Callable[[], str]) -> None:
    shutil.rmtree("study/runs")
    table = plan.RUNS.read_text()
    plan.RUNS.write_text(re.sub(r"^(3,)0\.\d+", r"\g<1>0.999999", table, flags=re.MULTILINE))
    project.commit(repository)
    project.edit(repository, {"study.seeds": 1})
    assert trained(inside()) == (1, 1)


@pytest.mark.recipe
def test_a_kept_run_is_named_by_all_that_decides_what_it_gives() -> None:
    config = params.load(ROOT / "params.yaml")
    changes: dict[str, object] = {
        "data.mean": 0.1, "data.std": 0.3, "data.validation": 100, "model.hidden": [10], "train.seed": 7,
        "train.epochs": 3, "train.batch_size": 32, "train.lr": 0.2, "train.momentum": 0.5, "train.weight_decay": 0.1,
        "train.device": "cuda", "train.threads": 2, "evaluate.batch_size": 100,
    }  # fmt: skip
    assert changes.keys() == {*VARIABLE, "train.seed"}
    code: dict[str, str | None] = {"a.py": "1"}
    keys = [replicate._key(config.replaced({name: value}), code, "f") for name, value in changes.items()]
    keys += [
        replicate._key(config, code, "f"),
        replicate._key(config, {"a.py": "2"}, "f"),
        replicate._key(config, code, "g"),
    ]
    assert len(set(keys)) == len(changes) + 3
    assert replicate._key(config.replaced({"study.seeds": 3, "plot.dpi": 50}), code, "f") in keys


def test_a_damaged_kept_run_is_trained_again(repository: Path, inside: Callable[[], str]) -> None:
    kept = {path: path.read_text() for path in sorted((repository / "study/runs").glob("*.json"))}
    forget(repository)
    (repository / "study/runs").mkdir()
    for path, damage in zip(kept, (slice(0, -50), slice(0, 0), slice(None)), strict=True):
        path.write_text(kept[path][damage])
    assert trained(inside()) == (SEEDS, 2)


@full
def test_a_study_that_is_killed_goes_on_with_the_missing_runs(studied: Path, repository: Path) -> None:
    forget(repository)
    process = subprocess.Popen(
        REPLICATE, cwd=repository, env=project.environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    kept = repository / "study/runs"
    while not list(kept.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    saved = len(list(kept.glob("*.json")))
    assert not (repository / plan.RUNS).exists()
    with socket.socket() as other:
        with suppress(OSError):  # another process has it already
            other.bind(("127.0.0.1", 8787))
            other.listen()
        done = project.run(repository, *REPLICATE)
    assert trained(done.stdout) == (SEEDS, SEEDS - saved)
    assert done.stderr == ""  # no warning: Dask's usual port belongs to another program
    assert rows(repository) == rows(studied)


@full
def test_ctrl_c_ends_a_study_in_one_go(repository: Path) -> None:
    forget(repository)
    process = subprocess.Popen(
        ["dvc", "repro", "study/dvc.yaml"], cwd=repository, env=project.environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    kept = repository / "study/runs"
    while not list(kept.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: DVC, the stage and Dask's processes get it
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert list(kept.glob("*.json"))


class Cluster:
    """A real Dask scheduler, and workers that have neither a clone nor a shared disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.file = folder / "scheduler.json"
        self.start("scheduler", "--port", "0", "--scheduler-file", str(self.file), "--no-dashboard")
        address = ""
        while not address:  # Dask writes the file bit by bit
            time.sleep(0.01)
            with suppress(OSError, ValueError):
                address = json.loads(self.file.read_text())["address"]
        self.env = project.environment(DASK_SCHEDULER_ADDRESS=address)

    def start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        home = self.folder / f"{kind} {len(self.processes)}"
        home.mkdir(parents=True)
        command = [str(project.BIN / "dask"), kind, "--host", "127.0.0.1", *options]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=home, env=project.environment(), stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        where = ("--scheduler-file", str(self.file), "--no-dashboard", "--no-nanny", "--local-directory", ".")
        return self.start("worker", *where, *(options or ("--nthreads", "1")))

    def wait(self, workers: int) -> None:
        with distributed.Client(self.env["DASK_SCHEDULER_ADDRESS"]) as client:
            client.wait_for_workers(workers)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def dask_cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


@full
def test_a_cluster_gives_the_same_bytes_though_a_worker_dies_and_others_are_not_fit(
    repository: Path, enter: Callable[[Path], None], dask_cluster: Cluster, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One worker has other arithmetic, one has two threads; of two others, one is killed in its first run."""
    enter(repository)
    preload = tmp_path / "other.py"
    preload.write_text(OTHER_ARITHMETIC)
    dask_cluster.worker("--nthreads", "1", "--preload", str(preload))
    dask_cluster.worker("--nthreads", "2")
    trap = tmp_path / "trap.py"  # sets itself when the worker has got the code
    trap.write_text("""if True:
        import os, signal, sys, threading, time
        def watch():
            while not hasattr(sys.modules.get("mnist_mlp.recipe.training"), "train"):
                time.sleep(0.01)
            sys.modules["mnist_mlp.recipe.training"].train = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=watch, daemon=True).start()""")
    doomed = dask_cluster.worker("--nthreads", "1", "--preload", str(trap))
    dask_cluster.wait(3)
    with dask.config.set({"scheduler-address": dask_cluster.env["DASK_SCHEDULER_ADDRESS"]}):
        runs = cluster.run_all(plan.configs(params.load()))
        threading.Timer(0, lambda: doomed.wait() and dask_cluster.worker()).start()  # joins late
        assert dict(runs) == dict(enumerate(outcomes(repository)))
    assert doomed.poll() == -signal.SIGKILL
    lines = [line.partition(" is left out: ")[2] for line in capsys.readouterr().err.splitlines()]
    first, second = sorted(lines)
    assert first.startswith("it computes other bytes")
    assert second.startswith("it has 2 threads")
    assert not list(dask_cluster.folder.rglob("runs.csv"))


@full
def test_new_code_reaches_workers_that_have_run_a_study_before(
    repository: Path, enter: Callable[[Path], None], dask_cluster: Cluster
) -> None:
    enter(repository)
    config = params.load()
    dask_cluster.worker()
    with dask.config.set({"scheduler-address": dask_cluster.env["DASK_SCHEDULER_ADDRESS"]}):
        ((_, before),) = cluster.run_all([config])
        code = Path("mnist_mlp/recipe/training.py")
        code.write_text(
            code.read_text().replace("manual_seed(config.train.seed)\n    return", "manual_seed(7)\n    return")
        )
        ((_, after),) = cluster.run_all([config])
    assert before.model_md5 != after.model_md5


@full
def test_a_worker_that_dies_costs_its_run_only_while_the_others_go_on(
    repository: Path, enter: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the local cluster, which starts another one. The run waits until its worker is killed."""
    enter(repository)
    once = repr(str(repository / "once"))
    stop = (
        f"if config.train.seed == 1 and not Path({once}).exists(): Path({once}).touch(); import time; time.sleep(600)"
    )
    change_training(repository, stop)
    runs = cluster.run_all(plan.configs(params.load()))
    ended = dict(next(runs) for _ in range(SEEDS - 1))
    while not (repository / "once").exists():
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "spawn_main" in " ".join(process.cmdline()):  # a worker, rather than Python's helper
            process.kill()
    assert ended | dict(runs) == dict(enumerate(outcomes(repository)))
    assert capfd.readouterr().err == ""


@full
def test_a_run_in_which_every_worker_dies_is_named(repository: Path, enter: Callable[[Path], None]) -> None:
    enter(repository)
    change_training(repository, "if config.train.seed == 2: import os; os._exit(9)")
    line = (
        "^3 workers have died in the run seed 2, perhaps by too little memory; "
        "start fewer on a machine, then run this again; `make study` keeps finished runs$"
    )
    with pytest.raises(UserError, match=line):
        list(cluster.run_all(plan.configs(params.load())))


def change_training(folder: Path, statement: str) -> None:
    training = folder / "mnist_mlp/recipe/training.py"
    head = "    torch.set_num_threads("
    training.write_text(training.read_text().replace(head, f"    {statement}\n{head}", 1))


@full
def test_a_worker_with_a_full_disk_is_left_out(
    repository: Path,
    enter: Callable[[Path], None],
    dask_cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a mount namespace of its own, where its folder is a small file system."""
    if project.run(tmp_path, "unshare", "-rm", "true", check=False).returncode:
        pytest.skip("no mount namespaces here")
    enter(repository)
    dask_cluster.worker()
    small = tmp_path / "small"
    small.mkdir()
    options = f"--scheduler-file {dask_cluster.file} --no-dashboard --no-nanny --nthreads 1 --host 127.0.0.1"
    command = f"mount -t tmpfs -o size=4m tmpfs {small} && exec dask worker {options} --local-directory {small}"
    address = dask_cluster.env["DASK_SCHEDULER_ADDRESS"]
    with (
        dask.config.set({"scheduler-address": address}),
        subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, env=project.environment(), stderr=subprocess.DEVNULL
        ) as worker,
    ):
        assert len(list(cluster.run_all(plan.configs(params.load())))) == SEEDS
        worker.kill()
    errors = capsys.readouterr().err
    assert re.fullmatch(r"worker \S+ is left out: OSError: \[Errno 28\] No space left on device\n", errors)


@pytest.mark.parametrize("address", ["foo", "tcp://127.0.0.1", "http://127.0.0.1", "tls://127.0.0.1"])
def test_an_address_that_is_none_is_one_line(address: str) -> None:
    line = f"the scheduler at DASK_SCHEDULER_ADDRESS={address} has no address such as tcp"
    with dask.config.set({"scheduler-address": address}), pytest.raises(UserError, match=line), cluster._client(1):
        pytest.fail("connected")
    gc.collect()  # a client that could not connect closes itself when it is collected, and waits if another just starts


def test_the_local_cluster_is_for_this_study_only() -> None:
    """On loopback, encrypted, and at ports that no other program has."""
    with cluster._client(1) as client:
        assert client.cluster is not None
        scheduler = client.cluster.scheduler
        assert scheduler.address.startswith("tls://127.0.0.1:")
        assert scheduler.http_server.address == "127.0.0.1"


def test_ctrl_c_is_not_lost_while_the_local_cluster_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**options: Any) -> distributed.LocalCluster:
        os.kill(os.getpid(), signal.SIGINT)
        return distributed.LocalCluster(**options)

    monkeypatch.setattr(cluster, "LocalCluster", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt), cluster._client(1):
            pytest.fail("Ctrl-C is lost")
    finally:
        signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # if it came by way of another thread


def test_a_scheduler_without_workers_and_one_that_is_not_there_are_one_line(
    mnist: Path, dask_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.WAIT <= 10  # the rest of the promised 20 seconds are for the imports
    monkeypatch.setattr(cluster, "WAIT", 1.0)
    config, address = params.load(ROOT / "params.yaml"), dask_cluster.env["DASK_SCHEDULER_ADDRESS"]
    for problem in ("has no worker; start one, ", r"does not answer \(.*\); start it, "):
        line = f"^the scheduler at DASK_SCHEDULER_ADDRESS={address} {problem}then run this again; `make study` keeps"
        with dask.config.set({"scheduler-address": address}), pytest.raises(UserError, match=line):
            next(cluster.run_all([config]))
        dask_cluster.stop()
    gc.collect()  # a client that could not connect closes itself when it is collected, and waits if another just starts


@full
def test_a_scheduler_that_is_lost_is_one_line(
    repository: Path, enter: Callable[[Path], None], dask_cluster: Cluster
) -> None:
    enter(repository)
    dask_cluster.worker()
    change_training(repository, "if config.train.seed > 1: import time; time.sleep(600)")
    address = dask_cluster.env["DASK_SCHEDULER_ADDRESS"]
    line = (
        f"^the scheduler at DASK_SCHEDULER_ADDRESS={address} does not answer .*; start it, then run this again; `make"
    )
    with dask.config.set({"scheduler-address": address}):
        runs = cluster.run_all(plan.configs(params.load()))
        assert next(runs) == (0, outcomes(repository)[0])
        dask_cluster.stop()
        with pytest.raises(UserError, match=line):
            next(runs)


@full
def test_a_full_disk_is_one_line_and_what_has_ended_is_kept(repository: Path) -> None:
    """In a mount namespace of its own, where `study/runs` is a file system with room for a few files."""
    forget(repository)
    (repository / "study/runs").mkdir()
    script = """
        mount -t tmpfs -o nr_inodes=2 tmpfs study/runs
        python -m stages.replicate; status=$?
        ls study/runs; exit $status"""
    if project.run(repository, "unshare", "-rm", "true", check=False).returncode:
        pytest.skip("no mount namespaces here")
    done = project.run(repository, "unshare", "-rm", "sh", "-c", script, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"replicate: cannot write \S+/study/runs/\w+\.json: No space left .*untouched\n", done.stderr)
    assert done.stdout.splitlines()[-1].endswith(".json")
    assert not (repository / plan.RUNS).exists()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"study.vary": {"train.speed": [1]}},
            "study.vary: 'train.speed' is no parameter that decides what a training",
        ),
        ({"study.vary": {"plot.dpi": [90]}}, "study.vary: 'plot.dpi' is no parameter that decides what a training"),
        ({"study.vary": {"train.seed": [1]}}, "(the seeds are those of study.seeds)"),
        ({"study.vary": {"train.lr": [0.1, -1]}}, "study.vary: train.lr is -1: input should be greater than 0"),
        ({"study.vary": {"model.hidden": [[32], 32]}}, "study.vary: model.hidden is 32: input should be a valid list"),
        ({"study.vary": {"train.lr": []}}, "study.vary.train.lr is []: list should have at least 1 item"),
        ({"study.vary": {"train.lr": [0.1, 0.10]}}, "study.vary: train.lr has 0.1 twice"),
        ({"study.seeds": 0}, "study.seeds is 0: input should be greater than or equal to 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_study_is_refused_before_anything_runs(tmp_path: Path, values: dict[str, object], problem: str) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    project.edit(tmp_path, values)
    with pytest.raises(UserError, match=rf"^params.yaml: .*{re.escape(problem)}"):
        params.load(tmp_path / "params.yaml")


def test_a_study_varies_what_stage_train_depends_on() -> None:
    """`VARIABLE` is the list of dvc.yaml, but for the seed; the study's pipeline depends on the same."""
    values = params.load(ROOT / "params.yaml").flat()
    for pipeline, stage in (("dvc.yaml", "train"), ("study/dvc.yaml", "replicate")):
        listed = yaml.safe_load((ROOT / pipeline).read_text())["stages"][stage]["params"]
        named = {key for name in listed for key in values if key == name or key.startswith(f"{name}.")}
        assert named - {"train.seed"} == set(VARIABLE)
    config = params.load(ROOT / "params.yaml")
    varied = {"model.hidden": [8, 4], "train.device": "cpu", "data.mean": 0.25}
    row = {name: str(value) for name, value in varied.items()}  # as in a table
    assert plan.config_of(row | {"seed": "3"}, config) == config.replaced(varied | {"train.seed": 3})


@pytest.mark.recipe
def test_settings_are_compared_by_seed_and_a_diverged_run_is_a_result(
    repository: Path, inside: Callable[[], str]
) -> None:
    project.edit(repository, {"study.vary": {"train.lr": [0.1, 0.05, 10.0]}})
    output = inside()
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:replicate")
    report.main()
    assert "train.lr 10.0, seed 1: diverged" in output
    (kept, other, diverged) = (rows(repository)[start : start + SEEDS] for start in (0, SEEDS, 2 * SEEDS))
    assert [row["accuracy"] + row["model_md5"] for row in diverged] == [""] * SEEDS

    summary = json.loads((repository / plan.SUMMARY).read_text())
    first, _, third = summary["settings"]
    accuracies = np.array([float(row["accuracy"]) for row in kept])
    assert first["accuracy"]["mean"] == pytest.approx(accuracies.mean(), abs=1e-6)
    assert first["accuracy"]["std"] == pytest.approx(accuracies.std(ddof=1), abs=1e-6)
    assert first["accuracy"]["values"] == pytest.approx(list(accuracies), abs=1e-6)  # too few for an interval
    assert (third["runs"], third["diverged"], third["target"]["reached"]) == (SEEDS, SEEDS, 0)
    # Wilson's interval of 0 and of 3 in 3, with z = 1.959964: from 0 to z² / (n + z²), and its mirror image.
    bound = 1.959964**2 / (3 + 1.959964**2)
    assert third["target"]["interval"] == pytest.approx([0, bound], abs=1e-6)
    assert first["target"]["interval"] == pytest.approx([1 - bound, 1], abs=1e-6)
    last = sorted(float(row["test_loss"]) for row in rows(repository, plan.HISTORY) if row["epoch"] == "1")
    published = first["last_epoch"]["test_loss"]
    assert (published["published"], published["percentile"]) == (0.086559, 0)  # two epochs are not enough
    assert min(last) <= published["median"] <= max(last)

    comparison = summary["comparison"]
    by_seed = np.array([float(row["accuracy"]) for row in other]) - accuracies
    (difference, none) = comparison["differences"]
    assert (difference["setting"], difference["pairs"]) == ("train.lr 0.05", SEEDS)
    assert difference["mean"] == pytest.approx(by_seed.mean(), abs=1e-6)
    assert (none["pairs"], none["mean"]) == (0, None)
    assert comparison["chooses_by_test_set"]
    said = words.in_words(summary)
    assert "Warning: this is the test set" in said
    assert f"{SEEDS} diverged" in said


def test_a_study_whose_runs_all_diverge_is_a_study(repository: Path, inside: Callable[[], str], call: Call) -> None:
    project.edit(repository, {"study.seeds": 2, "study.vary": {"train.lr": [project.DIVERGING]}})
    with (repository / "stages/report.py").open("a") as code:
        code.write("# edited\n")
    assert "seed 2: diverged" in inside()
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:replicate")
    report.main()
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:report")
    (found,) = json.loads((repository / plan.SUMMARY).read_text())["settings"]
    assert (found["runs"], found["diverged"], found["accuracy"]["mean"]) == (2, 2, None)
    said = call(study_record.main)[1]
    assert "0 of 2 runs reach 50.00% (95 % interval of the share 0.00% to 65.76%)" in said
    second, first, parent, *_ = store.search(record.STUDY, "attributes.run_name != 'published'")
    assert [run.info.status for run in (first, second, parent)] == ["FAILED", "FAILED", "FINISHED"]
    assert (parent.data.params["train.lr"], first.data.params["train.lr"]) == ("[1000000.0]", "1000000.0")
    assert runs.PATCH in {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(parent.info.run_id)}


@full
def test_with_a_validation_set_settings_and_champion_are_chosen_by_it(
    repository: Path, inside: Callable[[], str], call: Call
) -> None:
    project.edit(
        repository,
        {"data.validation": HELD_OUT, "study.seeds": 2, "study.vary": {"train.lr": [project.LR, project.LR / 2]}},
    )
    inside()
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:replicate")
    report.main()
    assert {"validation_accuracy", "model_md5"} <= rows(repository)[0].keys()
    assert list(rows(repository, plan.HISTORY)[0])[-2:] == ["val_loss", "val_acc"]
    comparison = json.loads((repository / plan.SUMMARY).read_text())["comparison"]
    assert (comparison["metric"], comparison["chooses_by_test_set"]) == ("validation_accuracy", False)

    train.main()
    evaluate.main()
    project.dvc("commit", "--force", "--quiet")
    assert f"{record.NAME} version 2, the champion" in call(track.main)[1]
    metrics = json.loads((repository / "results/metrics.json").read_text())
    run = project.runs(repository)[0]
    assert run.data.metrics["validation_accuracy"] == metrics["validation_accuracy"] > 0.5
    history = (repository / "results/history.csv").read_text().splitlines()
    assert history[0].endswith(",val_loss,val_acc")
    client = mlflow.MlflowClient()
    version = client.get_model_version(record.NAME, "2")
    assert float(version.tags["validation_accuracy"]) == metrics["validation_accuracy"]
    # Better on the test set, worse on the validation set.
    tags = {"accuracy": "0.999", "validation_accuracy": "0.5"}
    mlflow.register_model(version.source, record.NAME, tags=tags)
    call(track.main)
    assert int(client.get_model_version_by_alias(record.NAME, registry.CHAMPION).version) == 2


def test_held_out_images_are_the_last_and_no_part_of_the_training(mnist: Path) -> None:
    config = params.load(ROOT / "params.yaml").replaced({"data.validation": HELD_OUT})
    whole = training.load(config.replaced({"data.validation": 0}), mnist)
    sets = training.load(config, mnist)
    assert [len(part.labels) for part in whole] == [data.SIZES["train"], 0, data.SIZES["t10k"]]
    assert torch.equal(torch.cat([sets.train.images, sets.validation.images]), whole.train.images)
    assert torch.equal(sets.validation.labels, whole.train.labels[-HELD_OUT:])


def test_study_check_says_identical_or_the_first_difference(
    repository: Path, inside: Callable[[], str], call: Call
) -> None:
    status, output, _ = call(check.main)
    first, last = output.splitlines()
    assert status == 0
    assert re.fullmatch(r"training again: seed \d; seed \d", first)
    assert re.fullmatch(r"identical: seed \d; seed \d: every figure and the model's MD5", last)

    table = repository / plan.HISTORY
    *_, figure = table.read_text().partition("\n")[0].split(",")
    table.write_text(re.sub(r"^(\d,1,.*,)0\.\d+$", r"\g<1>0.123456", table.read_text(), flags=re.MULTILINE))
    line = f"study-check: {plan.HISTORY} is not what the study has made; run `make study`\n"
    assert call(check.main) == (2, "", line)
    project.dvc("commit", "--force", "--quiet", "study/dvc.yaml:replicate")  # as if other code had made it
    status, output, _ = call(check.main, "--runs", str(SEEDS))
    assert status == 1
    line = rf"^different: seed \d: epoch 1: {figure} is 0.123456 in the table, 0\.\d+ here$"
    assert len(re.findall(line, output, re.MULTILINE)) == SEEDS

    assert call(check.main, "--runs", "0") == (2, "", f"study-check: --runs is 0: the study has {SEEDS} runs\n")
    name, value, before = "data.mean", 0.25, params.load().data.mean
    project.edit(repository, {name: value})
    line = f"study-check: params.yaml: {name} is {value}, and the study was made with {before}; run `make study`\n"
    assert call(check.main) == (2, "", line)
    plan.LOCK.write_text("stages: {}")
    assert call(check.main) == (2, "", f"study-check: {plan.LOCK} has no study yet; run `make study`\n")


def test_study_check_compares_every_figure_and_the_model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = params.load(repository / "params.yaml")
    (row, run), *_ = plan.read(*((repository / path).read_text() for path in (plan.RUNS, plan.HISTORY)))
    others = {
        "accuracy": run._replace(metrics=run.metrics | {"accuracy": "0.5"}),
        "loss": run._replace(metrics=run.metrics | {"loss": "0.5"}),
        "the model's MD5": run._replace(model_md5="0"),
        "epoch 1: train_acc": run._replace(history=[run.history[0], run.history[1] | {"train_acc": "0.5"}]),
        "epoch 1: train_loss": run._replace(history=run.history[:1]),
    }
    for name, again in others.items():
        monkeypatch.setattr(cluster, "run_all", lambda _, again=again: iter([(0, again)]))
        (line,) = check.check(config, [(row, run)])
        assert line.startswith(f"different: seed 1: {name} is ")


def test_the_summary_pairs_by_seed_and_counts_runs_below_the_published_figure() -> None:
    names = ["a"] * 21 + ["b"] * 20
    seeds = [*range(1, 22), *range(21, 1, -1)]  # the second setting lacks seed 1, and comes in another order
    noise = [0.0] * 21 + [0.01 * (-1) ** n for n in range(20)]
    accuracy = [0.9 + seed / 1000 + difference for seed, difference in zip(seeds, noise, strict=True)]
    runs = pd.DataFrame({report.SETTING: names, "seed": seeds, "accuracy": accuracy})
    (difference,) = report.compare(runs)["differences"]
    assert (difference["pairs"], difference["mean"]) == (20, 0.0)
    assert difference["interval"] == pytest.approx([-0.0043, 0.0043], abs=3e-4)  # by Student's t it would be 0.0047

    values = np.arange(21) / 100
    history = pd.DataFrame({report.SETTING: "a", "seed": range(1, 22), "epoch": 0} | dict.fromkeys(FIGURES, values))
    published = pd.DataFrame({name: [0.05] for name in FIGURES})
    last = report.describe(runs, history, published, "a", 0.91)["last_epoch"]["test_acc"]
    assert last["percentile"] == pytest.approx(100 * 5 / 21, abs=1e-6)
    assert (last["median"], last["band_90"]) == (0.1, [0.01, 0.19])


def test_a_setting_counts_all_its_runs_and_describes_those_that_ended() -> None:
    accuracies = [0.9, 0.9, 0.98, math.nan]
    runs, history, published = of_one_setting(accuracies)
    runs = runs.assign(validation_accuracy=[0.9, math.nan, 0.9, math.nan])
    others = runs.assign(**{report.SETTING: "b", "accuracy": math.nan})
    found = report.describe(pd.concat([runs, others]), history, published, "a", 0.98)
    assert (found["runs"], found["diverged"], found["target"]["reached"], found["target"]["share"]) == (4, 1, 1, 0.25)
    expected = {"mean": 0.926667, "std": 0.046188, "median": 0.9, "min": 0.9, "max": 0.98}
    assert found["accuracy"] == expected | {"values": accuracies[:3]}
    comparison = report.compare(pd.concat([runs, runs.assign(**{report.SETTING: "b"})]))
    assert comparison["metric"] == "accuracy"  # some runs that ended have no validation accuracy
    assert words.in_words({"settings": [found], "comparison": comparison}).splitlines()[:10] == [
        "",
        "accuracy, difference from a in points, paired by seed:",
        "- b: +0.00 (values +0.00, +0.00, +0.00, 3 pairs)",
        "Warning: this is the test set. To choose a setting by it is to train on it; set data.validation.",
        "",
        "a: 4 runs, 1 diverged",
        "test accuracy: mean 92.67% (values 90.00%, 90.00%, 98.00%), standard deviation 4.62%, median 90.00%, "
        "from 90.00% to 98.00%",
        "1 of 4 runs reach 98.00% (95 % interval of the share 4.56% to 69.94%)",
        "",
        "| after the last epoch | published | median | 90 % of the runs | percentile |",
    ]
    comparison |= {"chooses_by_test_set": False, "differences": [{"setting": "b", "pairs": 6, "mean": -0.01}]}
    comparison["differences"][0]["interval"] = [-0.02, 0.01]
    assert words.in_words({"settings": [], "comparison": comparison}).splitlines()[2:] == [
        "- b: -1.00 (95 % interval -2.00 to +1.00, 6 pairs)"
    ]


def test_an_interval_of_the_mean_stays_in_the_range_of_the_runs_and_few_runs_have_none() -> None:
    outlier = pd.Series([0.4721, *(0.98 + n / 1e4 for n in range(20))])
    low, high = report.distribution(outlier)["interval"]
    assert 0.4721 < low < outlier.mean() - 0.03
    assert outlier.mean() < high < outlier.max()
    assert report.distribution(outlier) == report.distribution(outlier)
    assert report.distribution(outlier[:6])["interval"][0] > 0.4721
    assert report.distribution(pd.Series([0.98] * 6))["interval"] == [0.98, 0.98]
    few = report.distribution(outlier[:5])
    assert few["values"] == [0.4721, 0.98, 0.9801, 0.9802, 0.9803]
    assert "interval" not in few


def of_one_setting(accuracy: list[float]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Runs and their history of one epoch; no published figures."""
    runs = pd.DataFrame({report.SETTING: "a", "seed": range(len(accuracy)), "accuracy": accuracy})
    history = runs[[report.SETTING, "seed"]].assign(epoch=0, **dict.fromkeys(FIGURES, 0.5))
    return runs.assign(batch_mean_accuracy=accuracy), history, pd.DataFrame(columns=["epoch", *FIGURES])


def test_a_study_without_published_figures_has_all_else() -> None:
    runs, history, published = of_one_setting([0.97, 0.98])
    summary = {"settings": [report.describe(runs, history, published, "a", 0.977)]}
    said = words.in_words(json.loads(json.dumps(summary)))
    assert "mean 97.50% (values 97.00%, 98.00%)" in said
    assert "| test acc |  | 50.00% | 50.00% to 50.00% |  |" in said
    report.curves(runs, history[:0], published).draw_without_rendering()  # where all runs have diverged
    axes = report.curves(runs, history, published).axes[-1]
    assert "published" not in [line.get_label() for line in axes.lines]
    (axes,) = report.dots(runs, published, 0.977).axes
    assert [line.get_label() for line in axes.lines if line.get_linestyle() == "--"] == ["target"]


def test_a_curve_has_the_median_the_bands_and_the_published_figures() -> None:
    values = np.arange(21) / 100
    columns = {report.SETTING: "a", "seed": list(range(1, 22)) * 2, "epoch": [0] * 21 + [1] * 21}
    history = pd.DataFrame(columns | {key: [*values, *(values + 0.5)] for key in FIGURES})
    published = pd.DataFrame({"epoch": [0, 1]} | {key: [0.3, 0.4] for key in FIGURES})
    runs = pd.DataFrame({report.SETTING: ["none of it", "a"], "seed": 1})
    *_, axes = report.curves(runs, history, published).axes
    outlines = [np.asarray(path.vertices) for band in axes.collections for path in band.get_paths()]
    bands = [tuple(np.unique(outline[:, 1]).round(6)) for outline in outlines]
    assert bands == [(0.01, 0.19, 0.51, 0.69), (0.05, 0.15, 0.55, 0.65)]
    drawn = {line.get_label(): list(np.asarray(line.get_ydata()).round(6)) for line in axes.lines}
    assert drawn == {"none of it": [], "a": [0.1, 0.6], "published": [0.3, 0.4]}
    colours = [line.get_color() for line in axes.lines]
    assert colours == [*report._colours(2), pictures.PUBLISHED]


def test_bands_of_many_settings_are_narrow_and_a_legend_shows_their_colour() -> None:
    history = pd.DataFrame({"seed": range(1, 22), "epoch": 0} | dict.fromkeys(FIGURES, np.arange(21) / 100))
    published = pd.DataFrame(columns=["epoch", *FIGURES])
    narrow = [0.05, 0.15]  # half of the runs
    for names, count in ((report.ONLY, 2), ("ab", 4), ("abc", 3)):
        settings = [names] if names == report.ONLY else list(names)
        several = pd.concat([history.assign(**{report.SETTING: name}) for name in settings])
        figure = report.curves(several, several, published)
        for axes in figure.axes:
            assert len(axes.collections) == count
            assert [np.asarray(band.get_facecolor())[0, 3] for band in axes.collections] == [1] * count
            assert {line.get_marker() for line in axes.lines} == {"o"}  # of one epoch, a line would not be seen
            extents = [band.get_paths()[0].get_extents() for band in axes.collections]
            assert all([extent.y0, extent.y1] == pytest.approx(narrow) for extent in extents[-len(settings) :])
            shares = ["50 %"] if len(settings) > 2 else ["90 %", "50 %"]
            assert all(share in figure.get_suptitle() for share in shares if names != report.ONLY)


@pytest.mark.parametrize("far_below", [0, 4, 7])
def test_every_run_is_a_dot_or_counted(far_below: int) -> None:
    accuracies = [0.98 + n / 1e4 for n in range(30 - far_below)] + [0.5 + n / 100 for n in range(far_below)]
    runs = pd.DataFrame({report.SETTING: report.ONLY, "seed": range(30), "batch_mean_accuracy": accuracies})
    (axes,) = report.dots(runs, pd.DataFrame({"test_acc": [0.9775]}), 0.977).axes
    arrows = [line for line in axes.lines if line.get_marker() == "<"]
    dots = sum(len(np.asarray(line.get_xdata())) for line in axes.lines if line.get_marker() == "o")
    assert dots == 30 - far_below
    assert len(arrows) == (far_below if far_below <= 4 else 1)
    texts = [text.get_text() for text in axes.texts]
    assert texts == (
        ["7 runs, 50.0 % to 56.0 %"] if far_below == 7 else [f"{n}.0 %" for n in range(50, 50 + far_below)]
    )
    low, high = sorted(axes.get_ylim())
    assert all(low < float(np.asarray(line.get_ydata())[0]) < high for line in arrows)
    marks = {str(line.get_label()): np.asarray(line.get_xdata())[0] for line in axes.lines[-2:]}
    assert marks == {"published": 0.9775, "target": 0.977}


def test_mlflow_has_one_parent_and_a_child_for_each_run_and_gets_them_once(
    repository: Path, enter: Callable[[Path], None]
) -> None:
    enter(repository)
    store.connect(record.STUDY)

    def found() -> list[Run]:
        runs: list[Run] = mlflow.search_runs(experiment_names=[record.STUDY], output_format="list")
        return [run for run in runs if run.info.run_name != "published"]

    before = found()
    (parent,) = [run for run in before if "mlflow.parentRunId" not in run.data.tags]
    children = {
        run.info.run_name: run for run in before if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert sorted(children) == [f"seed {seed}" for seed in range(1, SEEDS + 1)]
    assert len(before) == SEEDS + 1
    client = mlflow.MlflowClient()
    row, child = rows(repository)[1], children["seed 2"]
    assert child.data.params["train.seed"] == "2"
    assert child.info.start_time == child.info.end_time
    assert child.data.tags["setting"] == parent.info.run_name
    assert re.fullmatch(rf"study of {SEEDS}, [0-9a-f]{{7}}", parent.info.run_name)
    assert parent.data.params["train.lr"] == child.data.params["train.lr"]
    assert 0.5 < parent.data.metrics["accuracy"] < 1
    assert child.data.metrics["accuracy"] == float(row["accuracy"])
    assert child.data.tags["model.md5"] == row["model_md5"]
    points = client.get_metric_history(child.info.run_id, "test_loss")
    epochs = [row for row in rows(repository, plan.HISTORY) if row["seed"] == "2"]
    assert [f"{point.step},{point.value:.6f}" for point in points] == [
        f"{row['epoch']},{row['test_loss']}" for row in epochs
    ]
    artifacts = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"summary.json", "runs.csv", "history.csv", "params.yaml", "plots"}
    assert "published" in parent.data.tags["mlflow.note.content"]

    assert "was complete" in study_record.track(params.load())[1]
    assert len(found()) == len(before)
    client.set_terminated(parent.info.run_id, "KILLED")  # as when it was stopped before its end
    assert "is now complete" in study_record.track(params.load())[1]
    assert len(found()) == len(before)
    (parent,) = [run for run in found() if "mlflow.parentRunId" not in run.data.tags]
    shutil.rmtree(parent.info.artifact_uri.removeprefix("file://"))
    assert "has new results" in study_record.track(params.load())[1]
    assert client.list_artifacts(parent.info.run_id, "plots")

    table = (repository / plan.RUNS).read_text()
    better = re.sub(r"^(1,)0\.\d+", r"\g<1>0.999999", table, flags=re.MULTILINE)
    for path, damage in ((plan.SUMMARY, "{"), (plan.RUNS, better)):
        good = (repository / path).read_text()
        (repository / path).write_text(damage)
        with pytest.raises(UserError, match=f"{path} is not what the study has made; run `make study`"):
            study_record.main()
        (repository / path).write_text(good)


@full
def test_a_damaged_table_is_restored_as_the_line_says(repository: Path) -> None:
    table = (repository / plan.RUNS).read_text()
    for path in (plan.SUMMARY, plan.RUNS):
        (repository / path).write_text("damaged")
    project.run(repository, *STUDY)  # as `make study` does
    assert (repository / plan.RUNS).read_text() == table
    (repository / "mlflow.db").unlink()
    assert "is now complete" in project.run(repository, *TRACK).stdout
    assert "was complete" in project.run(repository, *TRACK).stdout
