"""The net, and the arithmetic that gives it the same bytes on every x86-64 processor with AVX2."""

import math
import os
from collections.abc import Sequence
from itertools import chain, pairwise

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lineage import UserError
from mnist_mlp.recipe import data


class Linear(nn.Linear):
    """``nn.Linear`` with sums in a fixed order: the same bytes for any number of threads.

    Takes (..., in_features) and gives (..., out_features), as ``nn.Linear`` does. On a GPU, without oneDNN, for numbers
    other than float32, and in an exported graph, which must run anywhere, it *is* ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input @ weight.T + bias``."""
        elsewhere = input.is_cuda or input.dtype != torch.float32 or not torch.backends.mkldnn.is_available()
        if elsewhere or torch.compiler.is_exporting():
            return super().forward(input)
        if input.dim() != 2:
            return self.forward(input.reshape(-1, self.in_features)).reshape(*input.shape[:-1], self.out_features)
        if not len(input):  # oneDNN takes no empty batch
            return super().forward(input)
        output: Tensor = _FixedOrder.apply(input, self.weight, self.bias)
        return output


class _FixedOrder(torch.autograd.Function):
    """The product of a linear layer and the two products of its gradients, each by ``_product``."""

    @staticmethod
    def forward(ctx: FunctionCtx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        return (
            _product(gradient, weight.t()) if needs_input else None,
            _product(gradient.t(), input.t()) if needs_weight else None,
            gradient.sum(0) if needs_bias else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``a @ b.T + bias``, (N, K) by (M, K) to (N, M), with sums in a fixed order.

    On a CPU, PyTorch leaves matrix products to Intel's MKL. MKL chooses its kernels by the maker of the processor and
    by the number of threads. Each kernel adds in its own order, so the last bits differ. PyTorch also ships oneDNN,
    which does not look at the maker. Limited to AVX2 (see __init__.py), it computes each element of a product
    as one chain of fused multiply-adds along the inner dimension K, if K is at most 1024. Above 1024 it splits the
    chain into parts. The number of threads has no influence in either case. ``mkldnn::_linear_pointwise`` is the
    operator by which ``torch.compile`` calls oneDNN.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, bias, "none", [], "")
    return product


def mlp(hidden: Sequence[int]) -> nn.Sequential:
    """Build the net: pixels in, hidden layers with ReLU, a raw score for each class.

    784-400-200-100-10, as in the tutorial, has 415,310 parameters.

    Raises:
        UserError: the machine has too little memory for it.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    widths = [math.prod(data.SHAPE), *hidden, data.CLASSES]
    needed = 2 * 4 * sum(n_in * n_out for n_in, n_out in pairwise(widths))  # float32, and its gradient
    if needed > memory:
        raise UserError(
            f"params.yaml: model.hidden {list(hidden)} needs at least {needed / 1e9:.0f} GB of memory, "
            f"and this machine has {memory / 1e9:.0f} GB; lower the widths"
        )
    layers = [(Linear(n_in, n_out), nn.ReLU()) for n_in, n_out in pairwise(widths)]
    return nn.Sequential(*chain(*layers))[:-1]


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Turn grey levels 0 to 255, (N, *SHAPE) uint8, into the net's input, (N, pixels) float32."""
    return images.flatten(1).float().div_(255).sub_(mean).div_(std)


class ImageClassifier(nn.Module):
    """The net as others use it: raw images (N, *SHAPE), uint8, to probabilities (N, CLASSES)."""

    def __init__(self, net: nn.Module, mean: float, std: float) -> None:
        """Wrap a net that was trained on ``normalise(images, mean, std)``."""
        super().__init__()
        self.net, self.mean, self.std = net, mean, std

    def forward(self, images: Tensor) -> Tensor:
        """Normalise, score, and turn scores into probabilities."""
        probabilities: Tensor = self.net(normalise(images, self.mean, self.std)).softmax(1)
        return probabilities


def save_weights(net: nn.Module) -> bytes:
    """Write the weights as the content of a safetensors file, which holds numbers only and can run no code."""
    return safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in net.state_dict().items()})


def load_weights(net: nn.Module, content: bytes, name: str) -> None:
    """Fill the net with the weights of a safetensors file.

    Args:
        net: as ``mlp`` builds it.
        content: the file's bytes.
        name: what to call the file in an error.

    Raises:
        UserError: the file is not a whole safetensors file, or it holds the weights of another net.
    """
    try:
        net.load_state_dict(safetensors.torch.load(content))
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{name} is not a whole safetensors file ({error}); `dvc repro -f train` makes it again"
        ) from None
    except RuntimeError:
        raise UserError(
            f"{name} holds the weights of another net than model.hidden asks for; run `dvc repro`"
        ) from None
