"""The net, and the arithmetic that gives it the same bytes on every x86-64 processor with AVX2."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages import StageError


class _Dense(torch.autograd.Function):
    """``relu(x @ weight.T + bias)``, and its gradients, with sums in a fixed order.

    On a CPU PyTorch leaves matrix products to Intel's MKL, which chooses its kernels by the processor's maker and by
    the number of threads; each adds up in its own order, so the last bits differ. oneDNN, the other library that
    PyTorch ships, does not ask who made the processor: held to AVX2 (see stages/__init__.py), each element of a
    product is one chain of fused multiply-adds along the inner dimension, however the work is cut into blocks or
    shared between threads. ``mkldnn::_linear_pointwise`` is the operator by which torch.compile calls it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out = _product(x, weight, bias, "relu" if relu else "none")
        ctx.save_for_backward(x, weight, out)
        ctx.relu = relu
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward.default(grad, out, 0)
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _product(grad.t(), x.t()), grad.sum(0), None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, attr: str = "none") -> Tensor:
    """Compute ``a @ b.T + bias`` by oneDNN: (N, K) by (M, K) to (N, M)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, bias, attr, [], "")
    return product


class Dense(nn.Linear):
    """A fully connected layer, initialised as ``nn.Linear``, with a ReLU after it or none: (N, in) to (N, out)."""

    def __init__(self, in_features: int, out_features: int, relu: bool) -> None:
        """Draw weights and bias as ``nn.Linear`` does."""
        super().__init__(in_features, out_features)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; on a GPU, and in an exported model, by PyTorch's own operators."""
        if x.is_cuda or torch.compiler.is_exporting() or not torch.backends.mkldnn.is_available():
            out = functional.linear(x, self.weight, self.bias)
            return functional.relu(out) if self.relu else out
        out = _Dense.apply(x, self.weight, self.bias, self.relu)
        assert isinstance(out, Tensor)
        return out


def mlp(hidden: Sequence[int]) -> nn.Sequential:
    """Build the net: 784 pixels, hidden layers with ReLU, 10 raw scores. 415,310 parameters at 400, 200, 100."""
    widths = [784, *hidden]
    layers = [Dense(n_in, n_out, relu=True) for n_in, n_out in pairwise(widths)]
    return nn.Sequential(*layers, Dense(widths[-1], 10, relu=False))


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Turn grey levels 0 to 255, (N, 28, 28) uint8, into the net's input, (N, 784) float32."""
    return images.flatten(1).float().div_(255).sub_(mean).div_(std)


def score(net: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Score (N, 784) images in batches, without gradients: (N, 10)."""
    with torch.no_grad():
        return torch.cat([net(batch) for batch in images.split(batch_size)])


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
