"""Train the net by the tutorial's recipe: plain SGD on cross-entropy, tested after every epoch."""

import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from stages import HISTORY, MODEL, StageError, data, net, params, run, tracking, write

DIVERGED = 1000.0  # a loss from which training does not come back, though it may end up finite, with every ReLU dead


def main() -> None:
    """Train, write the weights and the history, and track both in MLflow."""
    p = params.load()
    device = _device(p.train.device)
    images, labels = _load("train", p, device)
    test_images, test_labels = _load("t10k", p, device)

    torch.manual_seed(p.train.seed)
    model = net.mlp(p.model.hidden).to(device)
    shuffle = torch.Generator().manual_seed(p.train.seed)  # of its own: nothing else that draws numbers moves it

    history = []
    if Path.cwd() != tracking.ROOT:  # one of several that DVC trains at once, each in a copy of the repository
        torch.set_num_threads(1)
    with tracking.new_run(p, threads=str(torch.get_num_threads())) as tracked:
        for epoch in tqdm(range(p.train.epochs), desc="train", unit="epoch", disable=None, leave=False):
            start = time.perf_counter()
            order = torch.randperm(len(images), generator=shuffle).to(device)
            try:
                steps = list(train_epoch(model, images, labels, order, p.train.batch_size, p.train.lr))
            except FloatingPointError as error:
                raise StageError(f"diverged in epoch {epoch}: {error}; try a train.lr below {p.train.lr}") from None
            train_loss, train_acc = (sum(figures) / len(steps) for figures in zip(*steps, strict=True))
            scores = net.score(model, test_images, p.evaluate.batch_size)
            test_loss, test_acc = net.batch_means(scores, test_labels, p.evaluate.batch_size)

            row = {"train_loss": train_loss, "train_acc": train_acc, "test_loss": test_loss, "test_acc": test_acc}
            row = {name: round(value, 6) for name, value in row.items()}
            history.append(row)
            tqdm.write(
                f"epoch {epoch:2d}  train loss {row['train_loss']:.6f}  train acc {row['train_acc']:.6f}  "
                f"test loss {row['test_loss']:.6f}  test acc {row['test_acc']:.6f}"
            )
            tracked.log_epoch(epoch, row | {"epoch_seconds": time.perf_counter() - start})

        weights = safetensors.torch.save({name: t.contiguous().cpu() for name, t in model.state_dict().items()})
        lines = [
            ",".join([str(epoch), *(f"{value:.6f}" for value in row.values())]) for epoch, row in enumerate(history)
        ]
        write(HISTORY, "\n".join([",".join(["epoch", *history[0]]), *lines]) + "\n")
        write(MODEL, weights)
        tracked.log_model(p, weights)


@torch.inference_mode()
def train_epoch(
    model: nn.Module, images: Tensor, labels: Tensor, order: Tensor, batch_size: int, lr: float
) -> Iterator[tuple[float, float]]:
    """Update the model once for each batch.

    Args:
        model: what to train, in place.
        images: (N, 784), on the model's device.
        labels: (N,), int64.
        order: (N,), the indices of the images in the order to take them.
        batch_size: the last batch holds what remains.
        lr: the step along the gradient.

    Yields:
        Cross-entropy and accuracy of each batch, as they were before the step on it.

    Raises:
        FloatingPointError: the loss is over ``DIVERGED``, or not a number.
    """
    layers, one_hot = net.dense_layers(model), torch.eye(10, device=images.device)
    for batch in order.split(batch_size):
        label = labels[batch]
        *inputs, scores = net.forward(layers, images.index_select(0, batch))  # faster than images[batch]
        loss = functional.cross_entropy(scores, label).item()
        if not loss < DIVERGED:  # nor is a loss that is no number
            raise FloatingPointError(f"the loss is {loss:.3g}, where guessing costs 2.3")
        accuracy = (scores.argmax(1) == label).sum().item() / len(batch)

        gradient = (scores.softmax(1) - one_hot[label]) / len(batch)  # of the cross-entropy, by the scores
        for parameter, slope in net.backward(layers, inputs, gradient):
            parameter.sub_(slope, alpha=lr)
        yield loss, accuracy


def _load(split: data.Split, p: params.Params, device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(array).to(device) for array in data.load(split))
    return net.normalise(images, p.data.mean, p.data.std), labels.long()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise StageError("params.yaml: train.device is 'cuda', but PyTorch finds no usable GPU here; set it to cpu")
    torch.use_deterministic_algorithms(name == "cuda")
    return torch.device(name)


if __name__ == "__main__":
    run(main)
