"""Time an epoch of the textbook's loop, of ours, of ours in plain PyTorch, and of the matrix products that all need.

    python -m tests.benchmark

An epoch is 938 batches of training and, after them, 79 of testing. The table gives the median of several epochs, timed
in turn. 'Plain PyTorch' is our loop, with the data in memory, over `nn.Linear`: it shows what comes from dropping the
DataLoader, and what sums in a fixed order cost. The products are those that training and testing need, by the operator
that our layer uses and by PyTorch's `@`. The last line times the whole pipeline, in a copy of the repository.
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lineage import cpu
from mnist_mlp import params
from mnist_mlp.recipe import data, net, training
from tests import project, textbook

ROUNDS = 7
ROOT = Path("data")


def main() -> None:
    config = params.load()
    train_set, _, test_set = training.load(config)
    torch.manual_seed(42)
    order = torch.randperm(len(train_set.images))

    def in_memory(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def epoch() -> None:
            training.train_epoch(model, optimizer, train_set, order, batch_size=64)
            training.test_epoch(model, test_set, batch_size=128)

        return epoch

    theirs = textbook.net()
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    their_train_set, their_test_set = textbook.dataset(ROOT, train=True), textbook.dataset(ROOT, train=False)

    def textbook_epoch() -> None:
        textbook.train_epoch(theirs, their_optimizer, their_train_set, order.tolist())
        textbook.test_epoch(theirs, their_test_set)

    epochs: dict[str, Callable[[], None]] = {
        "textbook loop": textbook_epoch,
        "ours": in_memory(net.mlp([400, 200, 100])),
        "ours, in plain PyTorch": in_memory(textbook.net()),
        "products, as ours": lambda: products(train_set.images, test_set.images, net._product),
        "products, `@`": lambda: products(train_set.images, test_set.images, lambda a, b: a @ b.t()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for round_ in range(ROUNDS + 1):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            epoch()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {ROUNDS} epochs\n")
    print("| one epoch | seconds | min to max | faster than the textbook |\n| --- | ---: | ---: | ---: |")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"| {name} | {median:.2f} | {spread} | {medians['textbook loop'] / median:.1f} times |")
    print()
    for other in ("products, as ours", "ours, in plain PyTorch"):
        # Measured next to each other, so what else the machine does weighs on both.
        ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds[other], strict=True)]
        print(f"ours / {other}: {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
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


def products(images: Tensor, test_images: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Multiply what an epoch must: training forward and backward, but for the images' gradient; testing forward."""
    weights = [torch.randn(n_out, n_in) for n_in, n_out in pairwise([784, 400, 200, 100, 10])]
    for batch in images.split(64):
        inputs = [batch]
        for weight in weights:
            inputs.append(product(inputs[-1], weight))
        for layer in reversed(range(len(weights))):
            gradient = inputs[layer + 1]  # of the right shape, which is all that matters here
            product(gradient.t(), inputs[layer].t())
            if layer:
                product(gradient, weights[layer].t())
    for batch in test_images.split(128):
        for weight in weights:
            batch = product(batch, weight)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
