"""The training loop of the tutorial: plain SGD on cross-entropy, and a test after every epoch.

The data lie in memory as two tensors, so a batch is an indexing operation. With a DataLoader, an epoch takes
at least three times as long (``make bench``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnist_mlp import UserError, data, net
from mnist_mlp.params import Params

DIVERGED = 1000.0  # a loss above this never comes back; it may become finite again, with every ReLU dead


class Dataset(NamedTuple):
    """Images (N, 784), float32 and normalised, with their labels (N,), int64."""

    images: Tensor
    labels: Tensor


class Epoch(NamedTuple):
    """The figures of one epoch: means over its batches. Accuracies are fractions."""

    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float


def load(split: data.Split, config: Params) -> Dataset:
    """Read the training or the test images, normalised, onto the device that ``train.device`` names.

    Raises:
        UserError: a file is missing or damaged, or there is no such device.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is 'cuda', but PyTorch finds no usable GPU here; set it to cpu")
    images, labels = (torch.from_numpy(array).to(config.train.device) for array in data.load(split))
    return Dataset(net.normalise(images, config.data.mean, config.data.std), labels.long())


def train(model: nn.Module, train_set: Dataset, test_set: Dataset, config: Params) -> Iterator[Epoch]:
    """Train the model in place, and yield the figures of each epoch.

    Args:
        model: any classifier of (N, 784) images, on the device of the data.
        train_set: reshuffled each epoch, by a generator of its own: nothing else that draws numbers moves it.
        test_set: read in order after each epoch.
        config: for the recipe: ``train.*`` and ``evaluate.batch_size``.

    Raises:
        UserError: the training has diverged.
    """
    torch.use_deterministic_algorithms(config.train.device == "cuda")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.train.lr, momentum=config.train.momentum, weight_decay=config.train.weight_decay
    )
    shuffle = torch.Generator().manual_seed(config.train.seed)
    for epoch in range(config.train.epochs):
        order = torch.randperm(len(train_set.images), generator=shuffle)
        try:
            train_loss, train_acc = train_epoch(model, optimizer, train_set, order, config.train.batch_size)
            test_loss, test_acc = test_epoch(model, test_set, config.evaluate.batch_size)
        except FloatingPointError as error:
            raise UserError(f"diverged in epoch {epoch}: {error}; try a train.lr below {config.train.lr}") from None
        yield Epoch(train_loss, train_acc, test_loss, test_acc)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, dataset: Dataset, order: Tensor, batch_size: int
) -> tuple[float, float]:
    """Make one step for each batch.

    Args:
        model: what to train, in place.
        optimizer: of the model's parameters.
        dataset: on the model's device.
        order: indices of images, in the order in which to take them.
        batch_size: the last batch holds what remains.

    Returns:
        Cross-entropy and accuracy, means over the batches, each as it was before the step on its batch.

    Raises:
        FloatingPointError: a loss is above ``DIVERGED`` or NaN.
    """
    model.train()
    losses, accuracies = [], []
    for batch in order.to(dataset.labels.device).split(batch_size):
        labels = dataset.labels[batch]
        scores = model(dataset.images.index_select(0, batch))  # faster than images[batch]
        loss = functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        losses.append(_checked(loss))
        accuracies.append(_accuracy(scores, labels))
    return sum(losses) / len(losses), sum(accuracies) / len(accuracies)


def test_epoch(model: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, float]:
    """Score the data set; give cross-entropy and accuracy as ``batch_means`` does.

    Raises:
        FloatingPointError: a loss is above ``DIVERGED`` or NaN.
    """
    return batch_means(score(model, dataset.images, batch_size), dataset.labels, batch_size)


@torch.inference_mode()
def score(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Score (N, 784) images in batches: (N, 10)."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def batch_means(scores: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Cross-entropy and accuracy as the tutorial counts them: means over batches. A short last batch counts in full.

    Args:
        scores: (N, 10).
        labels: (N,), int64.
        batch_size: how many images a batch holds.

    Raises:
        FloatingPointError: the loss of a batch is above ``DIVERGED`` or NaN.
    """
    batches = list(zip(scores.split(batch_size), labels.split(batch_size), strict=True))
    losses = [_checked(functional.cross_entropy(batch, label)) for batch, label in batches]
    accuracies = [_accuracy(batch, label) for batch, label in batches]
    return sum(losses) / len(batches), sum(accuracies) / len(batches)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).sum().item() / len(labels)


def _checked(loss: Tensor) -> float:
    value = loss.item()
    if not value <= DIVERGED:  # `value > DIVERGED` would be false for NaN
        raise FloatingPointError(f"the loss is {value:.3g}, and guessing gives 2.3")
    return value
