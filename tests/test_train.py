import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages import data, net, train
from tests import textbook

TrainingSet = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def training_set(mnist: Path) -> TrainingSet:
    images, labels = (torch.from_numpy(array) for array in data.load("train", mnist))
    return net.normalise(images, 0.5, 0.5), labels.long()


def mlp(hidden: list[int]) -> torch.nn.Sequential:
    torch.manual_seed(42)
    return net.mlp(hidden)


def test_the_net_has_the_tutorials_size_and_pytorchs_initialisation() -> None:
    ours = mlp([400, 200, 100])
    torch.manual_seed(42)
    theirs = textbook.net()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 415_310
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "elsewhere"])
def test_every_step_agrees_with_the_textbook_loop(
    mnist: Path, training_set: TrainingSet, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32 rounding, from a common start for every two steps; also by the products that a GPU is given.

    Left alone, the two part within a hundred steps: a last bit decides on which side of zero a ReLU's input falls, and
    with it whether a whole gradient passes.
    """
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    images, labels = training_set
    order = torch.randperm(len(images))[:2_528]  # the last of 40 batches holds 32
    dataset = textbook.dataset(mnist.parents[1], train=True)
    ours, theirs = mlp([400, 200, 100]), textbook.net()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    steps = train.train_epoch(ours, images, labels, order, batch_size=64, lr=0.1)
    for chunk in order.split(2 * 64):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.data.copy_(a)
        expected = textbook.train_epoch(theirs, optimizer, dataset, chunk.tolist())
        np.testing.assert_allclose(list(islice(steps, len(expected))), expected, rtol=1e-6)
    assert next(steps, None) is None


def test_testing_agrees_with_the_textbook_loop(mnist: Path) -> None:
    images, labels = (torch.from_numpy(array) for array in data.load("t10k", mnist))
    ours, theirs = mlp([400, 200, 100]), textbook.net()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.data.copy_(a)
    scores = net.score(ours, net.normalise(images, 0.5, 0.5), 128)
    loss, accuracy = net.batch_means(scores, labels.long(), 128)
    expected_loss, expected_accuracy = textbook.test_epoch(theirs, textbook.dataset(mnist.parents[1], train=False))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert accuracy == pytest.approx(expected_accuracy, abs=1e-12)


@pytest.mark.parametrize("inner", [10, 64, 100, 200, 400, 784])
def test_an_element_of_a_product_is_one_chain_of_fused_multiply_adds(inner: int) -> None:
    """An order of summation that no processor, cache or number of threads has a say in."""
    generator = torch.Generator().manual_seed(inner)
    a, b = (torch.randn(rows, inner, generator=generator) for rows in (64, 100))
    chain = np.zeros((64, 100), np.float32)
    for k in range(
        inner
    ):  # in float64 the product is exact and the sum nearly so: rounded once, as the instruction does
        chain = (np.outer(a[:, k].double(), b[:, k].double()) + chain).astype(np.float32)
    assert np.array_equal(net._product(a, b).numpy(), chain)
    assert np.array_equal(net._product(a, b.t().contiguous().t()).numpy(), chain)


@pytest.mark.parametrize(("hidden", "batch_size"), [([400, 200, 100], 64), ([33, 7], 1000), ([], 1)])
def test_any_number_of_threads_gives_the_same_bytes(
    training_set: TrainingSet, hidden: list[int], batch_size: int
) -> None:
    images, labels = training_set
    order = torch.arange(min(4_000, 100 * batch_size))
    threads, digests = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            model = mlp(hidden)
            steps = list(train.train_epoch(model, images, labels, order, batch_size, lr=0.1))
            figures = net.batch_means(net.score(model, images[:1000], 128), labels[:1000], 128)
            weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
            digests.add(hashlib.sha256(repr((steps, figures)).encode() + weights).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_the_exported_model_takes_raw_images_and_returns_probabilities(mnist: Path) -> None:
    images = torch.from_numpy(data.load("t10k", mnist)[0])[:5]
    model = mlp([30])
    classifier = net.ImageClassifier(model, 0.5, 0.5)
    probabilities = classifier(images)
    assert torch.allclose(probabilities, model(net.normalise(images, 0.5, 0.5)).softmax(1))
    exported = torch.export.export(classifier, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.allclose(exported.module()(images), probabilities, atol=1e-6)
