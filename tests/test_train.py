"""The training loop: PyTorch's own, over a layer whose sums are exact."""

import hashlib
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lineage import UserError
from mnist_mlp import params
from mnist_mlp.recipe import data, exact, net, training
from tests import textbook

pytestmark = pytest.mark.recipe
full = pytest.mark.full


@pytest.fixture(scope="module")
def train_set(mnist: Path) -> training.Dataset:
    images, labels = (torch.from_numpy(array) for array in data.load("train", mnist))
    return training.Dataset(net.normalise(images, 0.5, 0.5), labels.long())


def first(dataset: training.Dataset, count: int) -> training.Dataset:
    return training.Dataset(*(tensor[:count] for tensor in dataset))


def sets(train_set: training.Dataset, test_set: training.Dataset) -> training.Sets:
    return training.Sets(train_set, first(train_set, 0), test_set)


def recipe(**train: object) -> params.Params:
    config = params.load()
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def mlp(hidden: list[int]) -> nn.Sequential:
    torch.manual_seed(42)
    return net.mlp(hidden)


def weights(model: nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def test_the_net_has_the_tutorials_size_and_pytorchs_initialisation() -> None:
    ours = mlp([400, 200, 100])
    torch.manual_seed(42)
    theirs = textbook.net()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 415_310
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    ("momentum", "weight_decay"), [(0.0, 0.0), pytest.param(0.9, 1e-3, marks=full)], ids=["plain", "momentum"]
)
def test_every_step_agrees_with_the_textbook_loop(
    mnist: Path, train_set: training.Dataset, momentum: float, weight_decay: float
) -> None:
    """To the rounding of a step, from a common start for every two.

    Left alone, the two part within a hundred steps: a last bit decides on which side of zero a ReLU's input is, and
    with it whether a whole gradient passes.
    """
    order = torch.randperm(len(train_set.images))[:2_528]  # the last of 40 batches holds 32
    dataset = textbook.dataset(mnist.parents[1], train=True)
    ours, theirs = mlp([400, 200, 100]), textbook.net()
    our_sgd, their_sgd = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
        for model in (ours, theirs)
    )
    for chunk in order.split(2 * 64):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.data.copy_(a)
        their_sgd.load_state_dict(deepcopy(our_sgd.state_dict()))
        expected = textbook.train_epoch(theirs, their_sgd, dataset, chunk.tolist())
        figures = training.train_epoch(ours, our_sgd, train_set, chunk, batch_size=64)
        np.testing.assert_allclose(figures, np.mean(expected, axis=0), rtol=1e-4)


def test_testing_agrees_with_the_textbook_loop(mnist: Path) -> None:
    images, labels = (torch.from_numpy(array) for array in data.load("t10k", mnist))
    ours, theirs = mlp([400, 200, 100]), textbook.net()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        b.data.copy_(a)
    test_set = training.Dataset(net.normalise(images, 0.5, 0.5), labels.long())
    loss, accuracy = training.test_epoch(ours, test_set, 128)
    expected_loss, expected_accuracy = textbook.test_epoch(theirs, textbook.dataset(mnist.parents[1], train=False))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert accuracy == pytest.approx(expected_accuracy, abs=1e-12)


def test_any_other_layers_train_by_the_same_loop(train_set: training.Dataset) -> None:
    torch.manual_seed(42)
    widths = pairwise([784, 64, 32])
    hidden = [layer for n_in, n_out in widths for layer in (exact.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Dropout(0.1), exact.Linear(32, 10, bias=False))
    small = first(train_set, 6_400)
    epochs = list(training.train(model, sets(small, small), recipe(epochs=2)))
    assert epochs[0]["train_acc"] < epochs[1]["train_acc"]
    assert epochs[1]["test_acc"] > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layer_takes_and_differentiates_whatever_nn_linear_does(dtype: torch.dtype) -> None:
    """Any number of leading dimensions, none too, with and without bias, and inputs that need no gradient."""
    ours, theirs = exact.Linear(6, 4, dtype=dtype), nn.Linear(6, 4, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for shape in [(6,), (5, 6), (2, 3, 6), (0, 6)]:
        inputs = torch.randn(shape, dtype=dtype)
        for needed in (True, False):
            a, b = (inputs.clone().requires_grad_(needed) for _ in range(2))
            for layer, value in ((ours, a), (theirs, b)):
                layer.zero_grad()
                output = layer(value)
                output.pow(2).sum().backward()
            assert ours(a).shape == theirs(b).shape
            for x, y in [(a.grad, b.grad), (ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)]:
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("hidden", "batch_size"),
    [
        ([400, 200, 100], 64),
        *(pytest.param(*case, marks=full) for case in (([33, 7], 1000), ([], 1), ([1500], 64), ([16], 5000))),
    ],
    ids=["recipe", "odd", "no hidden layer", "wide", "large batches"],
)
def test_any_number_of_threads_gives_the_same_bytes(
    train_set: training.Dataset, hidden: list[int], batch_size: int
) -> None:
    train, test = first(train_set, min(10_000, 50 * batch_size)), first(train_set, 1000)
    threads, digests = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3, 8):
            model, config = mlp(hidden), recipe(epochs=1, batch_size=batch_size, threads=number)
            epochs = list(training.train(model, sets(train, test), config))
            assert torch.get_num_threads() == number
            digests.add(hashlib.sha256(repr(epochs).encode() + weights(model)).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_any_layer_gives_the_same_bytes_whatever_number_of_threads_is_usual_here(train_set: training.Dataset) -> None:
    """With each number, convolution and batch normalisation add in another order: it is for params.yaml to say."""
    small = sets(first(train_set, 640), first(train_set, 640))
    threads, digests = torch.get_num_threads(), set()
    try:
        for usual in (1, 4):
            torch.set_num_threads(usual)
            torch.manual_seed(42)
            convolution = nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
            model = nn.Sequential(*convolution, nn.Linear(8 * 26 * 26, 10))
            epochs = list(training.train(model, small, recipe(epochs=1, threads=1)))
            torch.set_num_threads(usual)
            scores, _ = training.evaluate(model, small, recipe(threads=1))
            digests.add(hashlib.sha256(repr(epochs).encode() + weights(model) + scores.numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lr": 10.0}, "a step"),
        ({"lr": 1e6, "batch_size": 60_000}, "only the test: one step an epoch, and no further loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_divergence_is_noticed(train_set: training.Dataset, settings: dict[str, object], where: str) -> None:
    small = first(train_set, 6_400)
    with pytest.raises(UserError, match=rf"diverged in epoch 0: the loss is .*try a train.lr below {settings['lr']}"):
        list(training.train(mlp([32]), sets(small, small), recipe(epochs=1, **settings)))


def test_a_loss_that_is_not_a_number_counts_as_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CLASSES", 4)
    with pytest.raises(FloatingPointError, match=r"the loss is nan, and guessing gives 1\.4"):
        training.batch_means(torch.full((4, 4), torch.nan), torch.zeros(4, dtype=torch.long), 2)


def test_the_exported_model_takes_raw_images_and_runs_on_any_processor(mnist: Path) -> None:
    images = torch.from_numpy(data.load("t10k", mnist)[0])[:5]
    model = mlp([30])
    classifier = net.ImageClassifier(model, 0.5, 0.5).eval()
    probabilities = classifier(images)
    assert torch.allclose(probabilities, model(net.normalise(images, 0.5, 0.5)).softmax(1))
    exported = torch.export.export(classifier, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.allclose(exported.module()(images), probabilities, atol=1e-6)
    assert "linear" in str(exported.graph)
    assert "float64" not in str(exported.graph)
