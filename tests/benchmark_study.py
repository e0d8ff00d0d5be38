"""Time the study's runs: the loop alone, the same by Dask on one worker, and on two; and measure a worker's memory.

``python -m tests.benchmark_study`` takes about five minutes on 2 cores. It keeps nothing and changes nothing.
"""

import resource
import time

import dask
from distributed import Client, LocalCluster

from mnist_mlp import cluster, cpu, params
from mnist_mlp.params import Params

RUNS = 2


def main() -> None:
    config = params.load()
    members = [config.replaced({"train.seed": seed}) for seed in range(1, RUNS + 1)]
    cluster.fingerprint(config)  # reads the data and warms up

    start = time.perf_counter()
    for member in members:
        cluster.train_run(member)
    alone = time.perf_counter() - start
    one, memory = by_dask(members, workers=1)
    two, _ = by_dask(members, workers=2)

    print(f"{cpu()}, {RUNS} runs of the recipe\n")
    print("| | seconds | runs an hour |\n| --- | ---: | ---: |")
    for name, seconds in {"the loop alone": alone, "Dask, 1 worker": one, "Dask, 2 workers": two}.items():
        print(f"| {name} | {seconds:.0f} | {3600 * RUNS / seconds:.0f} |")
    print(
        f"\none worker takes {one / alone - 1:+.1%} to the loop alone; two give {one / two:.2f} times the runs of one"
    )
    print(f"peak memory of a worker: {memory:.2f} GiB; sent to each worker: {len(cluster.pack()) / 1e6:.1f} MB")


def by_dask(members: list[Params], workers: int) -> tuple[float, float]:
    """Train all on a cluster that is there already; give seconds, and the peak memory of a worker in GiB."""
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as local,
        dask.config.set({"scheduler-address": local.scheduler_address}),
    ):
        start = time.perf_counter()
        assert len(list(cluster.run_all(members))) == RUNS
        seconds = time.perf_counter() - start
        with Client(local.scheduler_address) as client:
            peaks = client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return seconds, max(peaks.values()) / 2**20


if __name__ == "__main__":
    main()
