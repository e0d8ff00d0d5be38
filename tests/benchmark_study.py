"""Time the study's runs: the loop alone, the same by Dask with one worker and with two; and a worker's memory.

``python -m tests.benchmark_study`` takes about eight minutes on 2 cores. It keeps nothing and changes nothing.
"""

import multiprocessing
import re
import statistics
import time
from pathlib import Path

from lineage import cpu
from mnist_mlp import params
from mnist_mlp.study import cluster

RUNS = 2  # for each row and for each half of the first row


def main() -> None:
    alone = by_loop()
    start, one, memory = by_dask(workers=1)
    _, two, _ = by_dask(workers=2)
    alone = statistics.mean([alone, by_loop()])  # before and after, as these machines change their speed

    print(f"{cpu()}, seconds a run of the recipe\n")
    print("| | seconds a run | runs an hour |\n| --- | ---: | ---: |")
    for name, seconds in {"the loop alone": alone, "Dask, 1 worker": one, "Dask, 2 workers": two}.items():
        print(f"| {name} | {seconds:.1f} | {3600 / seconds:.0f} |")
    print(f"\nto start Dask and its worker takes {start:.0f} s; after that,")
    print(f"one worker takes {one / alone - 1:+.1%} to the loop alone; two give {one / two:.2f} times the runs of one")
    print(f"peak memory of a worker: {memory:.2f} GiB; sent to each worker: {len(cluster.pack()) / 1e6:.1f} MB")


def by_loop() -> float:
    """Train in this process; give the seconds that a run takes, data in memory."""
    config = params.load()
    cluster.fingerprint(config)  # warms up
    cluster.train_run(config.replaced({"train.epochs": 1}))  # reads the data
    start = time.perf_counter()
    for seed in range(1, RUNS + 1):
        cluster.train_run(config.replaced({"train.seed": seed}))
    return (time.perf_counter() - start) / RUNS


def by_dask(workers: int) -> tuple[float, float, float]:
    """Train with the workers that `make study` starts on as many cores.

    Returns:
        The seconds to start, which are those until every worker has made a run, less those of the runs; the seconds of
        a run; and the peak memory of a worker in GiB.
    """
    vars(cluster)["CPU_COUNT"] = workers
    config = params.load()
    members = [config.replaced({"train.seed": seed}) for seed in range(1, (RUNS + 1) * workers + 1)]
    start = time.perf_counter()
    ends, memory = [], 0.0
    for _ in cluster.run_all(members):
        ends.append(time.perf_counter() - start)
        memory = max(memory, *(peak_memory(process.pid) for process in multiprocessing.active_children()))
    first = ends[workers - 1]
    seconds = (ends[-1] - first) / (len(ends) - workers)
    return first - seconds * workers, seconds, memory


def peak_memory(pid: int | None) -> float:
    """Ask Linux, in GiB. `getrusage` would count what the parent had when it started the process."""
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kilobytes) / 2**20


if __name__ == "__main__":
    main()
