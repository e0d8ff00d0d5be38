"""Time four whole pipelines, as DVC experiments one after the other and as four at once, each with another seed.

``python -m tests.benchmark_experiments`` takes eight minutes.
"""

import os
import tempfile
import time
from pathlib import Path

from mnist_mlp.recipe import data
from tests import project


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = project.make(Path(scratch), data.RAW.resolve(), small=False)

        start = time.perf_counter()
        for seed in (1, 2, 3, 4):
            project.run(folder, "dvc", "exp", "run", "-S", f"train.seed={seed}")
        in_turn = time.perf_counter() - start

        project.run(folder, "dvc", "exp", "run", "--queue", "-S", "train.seed=5,6,7,8")
        start = time.perf_counter()
        project.run(folder, "dvc", "exp", "run", "--run-all", "--jobs", "4")
        at_once = time.perf_counter() - start
        assert len(project.runs(folder)) == 8

    print(f"four experiments on {os.cpu_count()} cores: {in_turn:.0f} s in turn, {at_once:.0f} s at once")


if __name__ == "__main__":
    main()
