"""The tutorial's recipe as textbooks write it: what our loop must agree with, and is timed against."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torchvision import datasets, transforms


class GivenOrder(Sampler[int]):
    """Take the images in a given order, where a textbook says ``shuffle=True``."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 400),
        nn.ReLU(),
        nn.Linear(400, 200),
        nn.ReLU(),
        nn.Linear(200, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def dataset(root: Path, train: bool) -> datasets.MNIST:
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    return datasets.MNIST(str(root), train=train, transform=scale)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: datasets.MNIST, order: list[int]
) -> list[tuple[float, float]]:
    """Train on batches of 64, in the given order; return loss and accuracy of every step."""
    steps = []
    model.train()
    for batch, label in DataLoader(images, batch_size=64, sampler=GivenOrder(order)):
        scores = model(batch.flatten(1))
        loss = nn.functional.cross_entropy(scores, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append((loss.item(), (scores.argmax(1) == label).sum().item() / len(label)))
    return steps


def test_epoch(model: nn.Module, images: datasets.MNIST) -> tuple[float, float]:
    """Test on batches of 128; return loss and accuracy, means over the batches."""
    loss_sum = accuracy_sum = 0.0
    model.eval()
    batches = DataLoader(images, batch_size=128)
    with torch.no_grad():
        for batch, label in batches:
            scores = model(batch.flatten(1))
            loss_sum += nn.functional.cross_entropy(scores, label).item()
            accuracy_sum += (scores.argmax(1) == label).sum().item() / len(label)
    return loss_sum / len(batches), accuracy_sum / len(batches)


test_epoch.__test__ = False  # type: ignore[attr-defined]  # no test, though its name begins like one
