"""The net, and the arithmetic that gives it the same bytes on every x86-64 processor with AVX2."""

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages import StageError

Layers = list[tuple[Tensor, Tensor]]


def mlp(hidden: Sequence[int]) -> nn.Sequential:
    """Build the net: 784 pixels, hidden layers with ReLU, 10 raw scores. 415,310 parameters at 400, 200, 100."""
    layers = [(nn.Linear(n_in, n_out), nn.ReLU()) for n_in, n_out in pairwise([784, *hidden, 10])]
    return nn.Sequential(*chain(*layers))[:-1]


def dense_layers(net: nn.Module) -> Layers:
    """List weight (M, K) and bias (M,) of each fully connected layer; they are the net's own, not copies."""
    return [(layer.weight, layer.bias) for layer in net.modules() if isinstance(layer, nn.Linear)]


def forward(layers: Layers, images: Tensor) -> list[Tensor]:
    """Give what goes into each layer, the images (N, 784) first, and then the scores (N, 10)."""
    values = [images]
    for weight, bias in layers:
        values.append(_product(values[-1], weight, bias, relu=weight is not layers[-1][0]))
    return values


def backward(layers: Layers, inputs: Sequence[Tensor], gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Give each parameter with its gradient, the last layer's first.

    It is what autograd would do, but with sums in our order, and in less time: a parameter can be updated as soon as
    it is given, while it is in the processor's cache, for nothing later needs its old value.

    Args:
        layers: as ``dense_layers`` lists them.
        inputs: of each layer, as ``forward`` gave them.
        gradient: the loss's by the scores, (N, 10).
    """
    for (weight, bias), x in zip(reversed(layers), reversed(inputs), strict=True):
        weight_gradient, bias_gradient = _product(gradient.t(), x.t()), gradient.sum(0)
        if x is not inputs[0]:  # through the layer to its input, and there through the ReLU
            gradient = torch.ops.aten.threshold_backward.default(_product(gradient, weight.t()), x, 0)
        yield weight, weight_gradient
        yield bias, bias_gradient


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Compute ``a @ b.T + bias``, (N, K) by (M, K) to (N, M), with sums in a fixed order.

    On a CPU PyTorch leaves matrix products to Intel's MKL, which chooses its kernels by the processor's maker and by
    the number of threads; each adds up in its own order, so the last bits differ. oneDNN, the other library that
    PyTorch ships, does not ask who made the processor: held to AVX2 (see stages/__init__.py), each element of a
    product is one chain of fused multiply-adds along the inner dimension, however the work is cut into blocks or
    shared between threads. ``mkldnn::_linear_pointwise`` is the operator by which torch.compile calls it.
    """
    product: Tensor
    if a.is_cuda or not torch.backends.mkldnn.is_available():
        product = functional.linear(a, b, bias)
        return product.relu() if relu else product
    product = torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "relu" if relu else "none", [], "")
    return product


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Turn grey levels 0 to 255, (N, 28, 28) uint8, into the net's input, (N, 784) float32."""
    return images.flatten(1).float().div_(255).sub_(mean).div_(std)


@torch.inference_mode()
def score(net: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Score (N, 784) images in batches: (N, 10)."""
    return torch.cat([forward(dense_layers(net), batch)[-1] for batch in images.split(batch_size)])


def batch_means(scores: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Cross-entropy and accuracy as the tutorial counts them: means over batches, so a short last one weighs as much.

    Args:
        scores: (N, 10).
        labels: (N,), int64.
        batch_size: how many images a batch holds.
    """
    batches = list(zip(scores.split(batch_size), labels.split(batch_size), strict=True))
    losses = [functional.cross_entropy(batch, label).item() for batch, label in batches]
    accuracies = [(batch.argmax(1) == label).sum().item() / len(label) for batch, label in batches]
    return sum(losses) / len(batches), sum(accuracies) / len(batches)


class ImageClassifier(nn.Module):
    """The net as others use it: raw images (N, 28, 28), uint8, to probabilities (N, 10)."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        """Wrap a net that was trained on ``normalise(images, mean, std)``."""
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Preprocess, score and turn scores into probabilities."""
        probabilities: Tensor = self.net(normalise(images, self.mean, self.std)).softmax(1)
        return probabilities


def load_weights(net: nn.Module, content: bytes, name: str) -> None:
    """Fill the net with the weights of a safetensors file, which holds numbers only and can run no code.

    Args:
        net: as ``mlp`` builds it.
        content: the file's bytes.
        name: what to call the file in an error.

    Raises:
        StageError: not a whole safetensors file, or the weights of another net.
    """
    try:
        net.load_state_dict(safetensors.torch.load(content))
    except safetensors.SafetensorError as error:
        raise StageError(
            f"{name} is not a whole safetensors file ({error}); `dvc repro -f train` makes it anew"
        ) from None
    except RuntimeError:
        raise StageError(f"{name} holds another net's weights than model.hidden asks for; run `dvc repro`") from None
