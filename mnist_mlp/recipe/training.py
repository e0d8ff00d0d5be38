"""The training loop of the tutorial: plain SGD on cross-entropy, and a test after every epoch.

The data lie in memory as two tensors, so a batch is an indexing operation. With a DataLoader, an epoch takes
at least three times as long (``make bench``).
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lineage import HERE, UserError
from mnist_mlp.recipe import data, exact, net
from mnist_mlp.recipe.params import Recipe

DIVERGED = 1000.0  # a loss above this never comes back; it may become finite again, with every ReLU dead


class DivergedError(UserError):
    """The loss has left every useful range: ``train.lr`` is too high for this seed."""


class Dataset(NamedTuple):
    """Images (N, pixels), float32 and normalised, with their labels (N,), int64."""

    images: Tensor
    labels: Tensor


class Sets(NamedTuple):
    """What a training reads. The validation set is empty unless ``data.validation`` holds images out."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load(config: Recipe, raw: Path = HERE / data.RAW) -> Sets:
    """Read all images, normalised, onto the device that ``train.device`` names.

    Args:
        config: the last ``data.validation`` of the training images become the validation set.
        raw: the folder with the data set's files.

    Raises:
        UserError: a file is missing or damaged, or there is no such device.
    """
    train, test = (
        _load(split, raw, config.data.mean, config.data.std, config.train.device) for split in ("train", "t10k")
    )
    kept = len(train.labels) - config.data.validation
    return Sets(
        train=Dataset(train.images[:kept], train.labels[:kept]),
        validation=Dataset(train.images[kept:], train.labels[kept:]),
        test=test,
    )


@lru_cache(maxsize=2)  # a worker of the study trains again and again
def _load(split: data.Split, raw: Path, mean: float, std: float, device: str) -> Dataset:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: train.device is 'cuda', but PyTorch finds no usable GPU here; set it to cpu")
    images, labels = (torch.from_numpy(array) for array in data.load(split, raw))
    return Dataset(net.normalise(images, mean, std).to(device), labels.long().to(device))  # a GPU divides otherwise


def new_model(config: Recipe) -> nn.Module:
    """Build the net that ``model.hidden`` describes, with the initial weights of ``train.seed``."""
    torch.manual_seed(config.train.seed)
    return net.mlp(config.model.hidden).to(config.train.device)


def train(model: nn.Module, sets: Sets, config: Recipe) -> Iterator[dict[str, float]]:
    """Train the model in place, and yield the figures of each epoch: means over its batches, accuracies as fractions.

    Args:
        model: any classifier of (N, pixels) images, on the device of the data.
        sets: the training set is reshuffled each epoch, by a generator of its own: nothing else that draws numbers
            moves it. The others are read in order after each epoch.
        config: for the recipe: ``train.*`` and ``evaluate.batch_size``.

    Yields:
        ``train_loss``, ``train_acc``, ``test_loss``, ``test_acc``, and with a validation set ``val_loss``, ``val_acc``.

    Raises:
        DivergedError: a loss is above ``DIVERGED`` or NaN.
    """
    _set_arithmetic(config)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.train.lr, momentum=config.train.momentum, weight_decay=config.train.weight_decay
    )
    shuffle = torch.Generator().manual_seed(config.train.seed)
    for epoch in range(config.train.epochs):
        order = torch.randperm(len(sets.train.images), generator=shuffle)
        figures: dict[str, float] = {}
        try:
            loss, accuracy = train_epoch(model, optimizer, sets.train, order, config.train.batch_size)
            figures |= {"train_loss": loss, "train_acc": accuracy}
            loss, accuracy = test_epoch(model, sets.test, config.evaluate.batch_size)
            figures |= {"test_loss": loss, "test_acc": accuracy}
            if config.data.validation:
                loss, accuracy = test_epoch(model, sets.validation, config.evaluate.batch_size)
                figures |= {"val_loss": loss, "val_acc": accuracy}
        except FloatingPointError as error:
            raise DivergedError(f"diverged in epoch {epoch}: {error}; try a train.lr below {config.train.lr}") from None
        yield figures


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
        loss = exact.cross_entropy(scores, labels)
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
    """Score (N, pixels) images in batches: (N, CLASSES)."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def batch_means(scores: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Cross-entropy and accuracy as the tutorial counts them: means over batches. A short last batch counts in full.

    Args:
        scores: (N, CLASSES).
        labels: (N,), int64.
        batch_size: how many images a batch holds.

    Raises:
        FloatingPointError: the loss of a batch is above ``DIVERGED`` or NaN.
    """
    batches = list(zip(scores.split(batch_size), labels.split(batch_size), strict=True))
    losses = [_checked(exact.cross_entropy(batch, label)) for batch, label in batches]
    accuracies = [_accuracy(batch, label) for batch, label in batches]
    return sum(losses) / len(batches), sum(accuracies) / len(batches)


def evaluate(model: nn.Module, sets: Sets, config: Recipe) -> tuple[Tensor, dict[str, float]]:
    """Score a trained model.

    Returns:
        The scores of the test images, (N, CLASSES), and the metrics: ``accuracy``, exact, ``batch_mean_accuracy``, as
        the tutorial counts, and ``loss``, all of the test set; and with a validation set ``validation_accuracy``.
    """
    _set_arithmetic(config)
    scores = score(model, sets.test.images, config.evaluate.batch_size)
    metrics = {
        "accuracy": _accuracy(scores, sets.test.labels),
        "batch_mean_accuracy": batch_means(scores, sets.test.labels, config.evaluate.batch_size)[1],
        "loss": exact.cross_entropy(scores, sets.test.labels).item(),
    }
    if config.data.validation:
        held_out = score(model, sets.validation.images, config.evaluate.batch_size)
        metrics["validation_accuracy"] = _accuracy(held_out, sets.validation.labels)
    return scores, metrics


def _set_arithmetic(config: Recipe) -> None:
    """Compute as ``params.yaml`` says, however many cores there are: the bytes of most layers depend on it."""
    torch.set_num_threads(config.train.threads)
    if config.train.device == "cuda":  # on a CPU all is deterministic, and this call takes 2 s
        torch.use_deterministic_algorithms(True)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(1) == labels).sum().item() / len(labels)


def _checked(loss: Tensor) -> float:
    value = loss.item()
    if not value <= DIVERGED:  # `value > DIVERGED` would be false for NaN
        raise FloatingPointError(f"the loss is {value:.3g}, and guessing gives {math.log(data.CLASSES):.2g}")
    return value
