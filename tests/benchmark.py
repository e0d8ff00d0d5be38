"""Time an epoch three ways, in turn: the textbook loop, ours, and the bare matrix products, which no loop can beat.

    python -m tests.benchmark

An epoch is 938 batches of training and, after them, 79 of testing. The table gives the median of several epochs; the
products are those that training and testing need, by the operator that our net uses and by PyTorch's `@`.
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from stages import data, net, tracking, train
from tests import textbook

ROUNDS = 7
ROOT = Path("data")


def main() -> None:
    images, labels = _load("train")
    test_images, test_labels = _load("t10k")
    torch.manual_seed(42)
    order = torch.randperm(len(images))

    theirs = textbook.net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    train_set, test_set = textbook.dataset(ROOT, train=True), textbook.dataset(ROOT, train=False)

    def textbook_epoch() -> None:
        textbook.train_epoch(theirs, optimizer, train_set, order.tolist())
        textbook.test_epoch(theirs, test_set)

    ours = net.mlp([400, 200, 100])

    def our_epoch() -> None:
        list(train.train_epoch(ours, images, labels, order, batch_size=64, lr=0.1))
        net.batch_means(net.score(ours, test_images, 128), test_labels, 128)

    epochs: dict[str, Callable[[], None]] = {
        "textbook loop": textbook_epoch,
        "ours": our_epoch,
        "products, as ours": lambda: products(images, test_images, net._product),
        "products, `@`": lambda: products(images, test_images, lambda a, b: a @ b.t()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for round_ in range(ROUNDS + 1):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            epoch()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{tracking.cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}; median of {ROUNDS} epochs\n"
    )
    print("| one epoch | seconds | min to max | of the textbook's |\n| --- | ---: | ---: | ---: |")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"| {name} | {median:.2f} | {spread} | 1/{medians['textbook loop'] / median:.1f} |")
    # Measured next to each other, so what else the machine does weighs on both.
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["products, as ours"], strict=True)]
    print(f"\nours is {statistics.median(ratios):.2f} times its products, {min(ratios):.2f} to {max(ratios):.2f}")

    start = time.perf_counter()
    subprocess.run(
        [Path(sys.executable).with_name("dvc"), "repro", "--force", "--quiet"], check=True, stdout=subprocess.DEVNULL
    )
    whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"dvc repro --force: {whole:.0f} s, 1/{20 * medians['textbook loop'] / whole:.1f} of 20 textbook epochs; "
        f"peak memory of a stage {peak:.2f} GiB"
    )


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


def _load(split: data.Split) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(array) for array in data.load(split))
    return net.normalise(images, 0.5, 0.5), labels.long()


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main()
