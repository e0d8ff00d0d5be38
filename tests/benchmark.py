"""Time an epoch of the textbook's loop, of ours, of ours in plain PyTorch, and of the matrix products that all need.

    python -m tests.benchmark

An epoch is 938 batches of training and, after them, 79 of testing. The table gives the median of several epochs, timed
in turn, with `train.threads`. 'Plain PyTorch' is our loop, with the data in memory, over `nn.Linear` and PyTorch's
`cross_entropy`: it shows what comes from dropping the DataLoader, and what exact sums cost. The products are those that
training and testing need, bare. The last line times the whole pipeline, in a copy of the repository.
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from lineage import cpu
from mnist_mlp import params
from mnist_mlp.recipe import data, exact, net, training
from tests import project, textbook

ROUNDS = 5
ROOT = Path("data")


def main() -> None:
    config = params.load()
    cores = os.cpu_count() or 1  # as many threads as PyTorch takes by itself
    train_set, _, test_set = training.load(config)
    torch.manual_seed(42)
    order = torch.randperm(len(train_set.images))

    def in_memory(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def epoch() -> None:
            training.train_epoch(model, optimizer, train_set, order, batch_size=64)
            training.test_epoch(model, test_set, batch_size=128)

        return epoch

    in_plain_pytorch = in_memory(textbook.net())

    def plain_epoch() -> None:
        with patch.object(exact, "cross_entropy", functional.cross_entropy):
            in_plain_pytorch()

    theirs = textbook.net()
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    their_train_set, their_test_set = textbook.dataset(ROOT, train=True), textbook.dataset(ROOT, train=False)

    def textbook_epoch() -> None:
        textbook.train_epoch(theirs, their_optimizer, their_train_set, order.tolist())
        textbook.test_epoch(theirs, their_test_set)

    def with_all_cores() -> None:
        torch.set_num_threads(cores)
        textbook_epoch()

    epochs: dict[str, Callable[[], None]] = {
        "textbook loop": textbook_epoch,
        f"textbook loop, {cores} threads": with_all_cores,
        "ours": in_memory(net.mlp([400, 200, 100])),
        "ours, in plain PyTorch": plain_epoch,
        "bare products, float64": lambda: products(train_set.images, test_set.images, torch.float64),
        "bare products, float32": lambda: products(train_set.images, test_set.images, torch.float32),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for round_ in range(ROUNDS + 1):
        for name, epoch in epochs.items():
            torch.set_num_threads(config.train.threads)
            start = time.perf_counter()
            epoch()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{cpu()}, {config.train.threads} thread(s), torch {torch.__version__}, median of {ROUNDS} epochs\n")
    print("| one epoch | seconds | min to max |\n| --- | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {min(seconds[name]):.2f} to {max(seconds[name]):.2f} |")
    print()
    for one, other in pairwise(["textbook loop", "ours", "bare products, float64", "bare products, float32"]):
        # Measured next to each other, so what else the machine does weighs on both.
        ratios = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
        print(f"{one} / {other}: {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    pipeline(20 * medians["textbook loop"])


def pipeline(textbook_seconds: float) -> None:
    """Run all stages in a copy of the repository, so that results, runs and champion of this one stay as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = project.make(Path(scratch, "repository"), data.RAW.resolve(), small=False)
        start = time.perf_counter()
        project.run(folder, "dvc", "repro")
        whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"dvc repro, data in place: {whole:.0f} s, {textbook_seconds / whole:.1f} times faster than the textbook")
    print(f"peak memory of a stage: {peak:.2f} GiB")


def products(images: Tensor, test_images: Tensor, dtype: torch.dtype) -> None:
    """Multiply what an epoch must: training forward and backward, but for the images' gradient; testing forward."""
    weights = [torch.randn(n_out, n_in, dtype=dtype) for n_in, n_out in pairwise([784, 400, 200, 100, 10])]
    batches = [batch.to(dtype) for batch in (images[:64], test_images[:128])]  # the same again: converting takes time
    for _ in range(len(images) // 64):
        inputs = [batches[0]]
        for weight in weights:
            inputs.append(inputs[-1] @ weight.t())
        for layer in reversed(range(len(weights))):
            gradient = inputs[layer + 1]  # of the right shape, which is all that matters here
            gradient.t() @ inputs[layer]
            if layer:
                gradient @ weights[layer]
    for _ in range(len(test_images) // 128):
        batch = batches[1]
        for weight in weights:
            batch = batch @ weight.t()


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
