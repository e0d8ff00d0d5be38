"""Many trainings at once, by Dask: on the cores of this machine, or on the workers of ``DASK_SCHEDULER_ADDRESS``.

One task is one run. Dask brings code and data to the workers, spreads the runs over them, and repeats the run of a
worker that dies. A worker gets runs only if it computes the same bytes as this machine.
"""

import importlib.metadata
import io
import logging
import platform
import signal
import sys
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
import torch
from dask.system import CPU_COUNT
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    Worker,
    WorkerPlugin,
    get_worker,
    wait,
)
from tqdm import tqdm

import lineage
import mnist_mlp
from lineage import UserError, cpu
from mnist_mlp.params import Params
from mnist_mlp.recipe import data, net, training
from mnist_mlp.recipe.history import rounded
from mnist_mlp.study import plan

ADDRESS = "DASK_SCHEDULER_ADDRESS"
PLUGIN = "project"
PACKAGES = ("lineage", "mnist_mlp")  # what a worker needs to train
WAIT = 10.0  # seconds for a scheduler to answer, and for a worker to be there
DEATHS = 3  # of workers in the same run, after which it is to blame
GO_ON = "then run this again; `make study` keeps finished runs"
# Dask's defaults make a training 25 % slower: its workers give every freed block back to the system, and a thread looks
# every 10 ms at what the worker does (python -m tests.benchmark_study).
SPEED = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    "distributed.worker.profile.enabled": False,
}


def train_run(config: Params, raw: Path = data.RAW) -> plan.Outcome:
    """Train and evaluate one net. It gives the bytes that stages ``train`` and ``evaluate`` give."""
    sets, model = training.load(config, raw), training.new_model(config)
    history = []
    try:
        for figures in training.train(model, sets, config):
            history.append(rounded(figures))
    except training.DivergedError:
        return plan.Outcome({}, "", history)
    metrics = rounded(training.evaluate(model, sets, config)[1])
    return plan.Outcome(metrics, lineage.md5(net.save_weights(model)), history)


def fingerprint(config: Params, raw: Path = data.RAW) -> str:
    """Train a few fixed steps and hash the weights. Machines with the same fingerprint compute the same bytes."""
    torch.set_num_threads(config.train.threads)
    dataset = training.load(config.replaced({"data.mean": 0.5, "data.std": 0.5}), raw).test
    torch.manual_seed(0)
    model = net.mlp(config.model.hidden).to(config.train.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.arange(min(640, len(dataset.labels)))
    training.train_epoch(model, optimizer, dataset, order, batch_size=64)
    return lineage.md5(net.save_weights(model))


def run_all(configs: Sequence[Params]) -> Iterator[tuple[int, plan.Outcome]]:
    """Train every run, on as many workers as there are.

    Args:
        configs: one for each run.

    Yields:
        The position in ``configs``, and the run, in the order in which the runs end.

    Raises:
        UserError: there is no scheduler, no fit worker, or a run in which one worker after the other dies.
    """
    expected = fingerprint(configs[0])
    with _client(min(len(configs), max(1, CPU_COUNT // configs[0].train.threads))) as client:
        work = _Work(client, configs)
        while work.waiting or any(index is not None for _, index in work.tasks.values()):
            work.meet_workers()
            for address in work.fit - work.tasks.keys():
                if work.waiting:
                    run = work.waiting.popleft()
                    work.tasks[address] = work.submit("run_on_worker", configs[run], address), run
            ended = _done([future for future, _ in work.tasks.values()])
            for address, (future, index) in list(work.tasks.items()):
                if future not in ended:
                    continue
                del work.tasks[address]
                if index is not None:
                    yield index, _result(future, configs[index])
                elif problem := _difference(future, expected):
                    _leave_out(address, problem)
                else:
                    work.fit.add(address)


class _Work:
    """Which runs wait, and what each worker does. A worker is known by its address."""

    def __init__(self, client: Client, configs: Sequence[Params]) -> None:
        self.client, self.configs = client, configs
        self.folder = _bring_project(client)
        self.waiting = deque(range(len(configs)))
        self.tasks: dict[str, tuple[Future[Any], int | None]] = {}  # a run, or None for the check of the worker
        self.known: set[str] = set()  # the workers that are there
        self.fit: set[str] = set()  # those that compute the same bytes
        self.died: Counter[int | None] = Counter()
        self.deadline = time.monotonic() + _patience()

    def meet_workers(self) -> None:
        """Have new workers checked, and put the runs of those that are gone at the head of the waiting ones.

        Raises:
            UserError: there is no fit worker, or workers die one after the other.
        """
        threads = self.client.nthreads()  # of each worker that is there now
        for address in threads.keys() - self.known:
            if threads[address] == 1:
                self.tasks[address] = self.submit("check_worker", self.configs[0], address), None
            else:
                _leave_out(address, f"it has {threads[address]} threads, start it with --nthreads 1")
        self.known = set(threads)
        self.fit &= self.known
        for address in self.tasks.keys() - self.known:  # another worker repeats the run
            _, index = self.tasks.pop(address)
            self.died[index] += 1
            if index is not None:
                self.waiting.appendleft(index)
            if self.died[index] >= DEATHS and not (index is None and self.fit):
                raise _deadly(None if index is None else self.configs[index])
        if self.tasks or self.fit:
            self.deadline = time.monotonic() + _patience()
        elif time.monotonic() > self.deadline:
            which = "no worker that can take a run" if threads else "no worker"
            raise UserError(f"{_where()} has {which}; start one, {GO_ON}")

    def submit(self, task: str, config: Params, worker: str) -> Future[Any]:
        """Ask a worker for ``check_worker`` or ``run_on_worker``."""
        folder = self.folder

        def on_worker(content: dict[str, Any]) -> Any:
            if problem := vars(get_worker().plugins[PLUGIN]).get("problem"):
                raise problem
            from mnist_mlp.study import cluster

            return getattr(cluster, task)(folder, content)

        content = config.model_dump(by_alias=True)
        return self.client.submit(on_worker, content, workers=[worker], allow_other_workers=False, pure=False)


@contextmanager
def _client(count: int) -> Iterator[Client]:
    """Connect to the scheduler that the user names, or start one with a worker for each core.

    Raises:
        UserError: no scheduler answers, or it is lost later.
    """
    for name in ("distributed", "distributed.client"):  # what matters is said in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    address = dask.config.get("scheduler-address", None)
    try:
        if address:
            with _connect(str(address)) as client:
                yield client
        else:
            workers = {"n_workers": count, "threads_per_worker": 1, "silence_logs": logging.CRITICAL}
            private = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "security": True}  # a free port; TLS
            # Ctrl-C is ours. The workers inherit that it is blocked; what arrives meanwhile comes when it is not.
            resource_tracker.ensure_running()  # Python's helper, at whose start it would be unblocked
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with dask.config.set(SPEED), LocalCluster(**workers, **private) as cluster, Client(cluster) as client:
                try:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                    yield client
                except KeyboardInterrupt:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    tqdm.write("stopping Dask, which takes some seconds", file=sys.stderr)
                    raise
    except (OSError, CancelledError) as error:
        lost = isinstance(error, CancelledError)
        reason = "the connection is lost" if lost else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_where()} does not answer ({reason}); start it, {GO_ON}") from None


def _connect(address: str) -> Client:
    try:
        return Client(address, timeout=WAIT)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{_where()} has no address such as tcp://10.0.0.1:8786, or Dask's settings for TLS are missing ({error})"
        ) from None


def _patience() -> float:
    """Say how long to wait for a worker, in seconds. Those on this machine come back by themselves."""
    return WAIT if dask.config.get("scheduler-address", None) else 6 * WAIT


def _where() -> str:
    address = dask.config.get("scheduler-address", None)
    return f"the scheduler at {ADDRESS}={address}" if address else "Dask on this machine"


def _leave_out(address: str, problem: str) -> None:
    tqdm.write(f"worker {address} is left out: {' '.join(problem.split())}", file=sys.stderr)


def pack() -> bytes:
    """Put the packages and the data into a zip archive. The same files are the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        code = sorted(file for package in PACKAGES for file in Path(package).rglob("*.py"))
        for path in [*code, *(data.RAW / name for name in data.SHA256)]:
            archive.writestr(zipfile.ZipInfo(str(path)), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _bring_project(client: Client) -> str:
    """Put packages and data, 12 MB, on every worker, those that join later included; give the folder's name there.

    A worker has no clone to import from. Dask sends the code of what is defined inside a function.
    """

    class Project(WorkerPlugin):
        name = PLUGIN  # a newer one takes the place of an older one

        def setup(self, worker: Worker) -> None:
            folder = Path(worker.local_directory, digest)
            try:
                zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
            except Exception as error:  # such as a full disk; the check of this worker tells
                self.problem = error
            sys.path.insert(0, str(folder))
            for module in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
                del sys.modules[module]  # of an earlier study

    archive = pack()
    digest = lineage.md5(archive)
    client.register_plugin(Project())
    return digest


def _done(futures: list[Future[Any]]) -> set[Future[Any]]:
    """Wait until one ends, but not for long: workers come and go."""
    if not futures:
        time.sleep(0.1)
        return set()
    try:
        return set(wait(futures, timeout=1, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return set()


def _result(future: Future[Any], config: Params) -> plan.Outcome:
    try:
        return plan.Outcome(*future.result())
    except KilledWorker:  # Dask's own count, of a worker that dies and comes back at the same address
        raise _deadly(config) from None


def _deadly(config: Params | None) -> UserError:
    what = f"the run {plan.label(plan.identity(config))}" if config else "their check"
    why = "perhaps by too little memory; start fewer on a machine"
    return UserError(f"{DEATHS} workers have died in {what}, {why}, {GO_ON}")


def _difference(check: Future[Any], expected: str) -> str | None:
    """Say why a worker must not get runs; None if it may."""
    try:
        found = check.result()
    except Exception as error:  # whatever keeps it from training
        return f"{type(error).__name__}: {error}"
    if found.pop("fingerprint") == expected:
        return None
    here = _machine()
    other = [f"{name} {value}, here {here[name]}" for name, value in found.items() if value != here[name]]
    return f"it computes other bytes ({'; '.join(other) or 'versions and processor are the same'})"


def check_worker(folder: str, content: dict[str, Any]) -> dict[str, str]:
    """On a worker: train a few steps, and say what computes here."""
    return {"fingerprint": fingerprint(Params.model_validate(content), _raw(folder))} | _machine()


def run_on_worker(folder: str, content: dict[str, Any]) -> tuple[Any, ...]:
    """On a worker: train one run."""
    return tuple(train_run(Params.model_validate(content), _raw(folder)))


def _raw(folder: str) -> Path:
    """Find the data on the worker, and make sure that its code is this study's."""
    here = Path(get_worker().local_directory, folder)
    if Path(mnist_mlp.__file__).parents[1] != here:
        raise UserError(f"another study has brought its code to worker {get_worker().address}; wait for its end")
    return here / data.RAW


def _machine() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return versions | {"Python": platform.python_version(), "processor": cpu()}
