"""Exact sums: the same bytes whatever adds them up, and in whatever order. docs/exact.md derives it.

Processors add in different orders and round after each addition, so the last bits differ. Here, each operation that
touches a weight is exact, so that its order does not matter, or a single operation of IEEE 754, so that there is one
result. PyTorch does the rest: initial weights, ReLU and SGD. These have the same bytes on processors with fused
multiply-add, such as x86-64 with AVX2 and 64-bit Arm.
"""

import math
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional


class Linear(nn.Linear):
    """``nn.Linear`` with exact sums of rounded numbers.

    Takes (..., in_features) and gives (..., out_features), as ``nn.Linear`` does. For numbers other than float32, and
    in an exported graph, which must run anywhere, it *is* ``nn.Linear``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute ``input @ weight.T + bias``."""
        if input.dtype != torch.float32 or not input.numel() or torch.compiler.is_exporting():
            return super().forward(input)
        training = torch.is_grad_enabled()
        # A sum has a term for each input; in the gradients, one for each output, or for each row of the batch.
        terms = max(*self.weight.shape, input.numel() // self.in_features) if training else self.in_features
        bits = min(22, (53 - (terms - 1).bit_length()) // 2)
        # The score of an image must not depend on its neighbours: outside of training, each row has its own unit.
        input, weight = _rounded(input, bits, each_row=not training), _rounded(self.weight, bits)
        # The bias comes after the sum: BLAS would start from it. The sign of a sum of zeros depends on the order, so
        # 0.0 is added, which makes it +.
        output = input.double() @ weight.double().t() + (0.0 if self.bias is None else self.bias.double())
        if output.requires_grad:  # the three gradients are sums, too
            output.register_hook(lambda gradient: _rounded(gradient, bits))
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient + 0.0)
        return output.float()


def _rounded(values: Tensor, bits: int, each_row: bool = False) -> Tensor:
    """Round numbers to multiples of one unit, of which the largest has at most ``2 ** bits``.

    ``values + shift`` lies between a power of two and twice that, where the last bit of all numbers is the unit. The
    processor rounds the sum to it; taking ``shift`` away again is exact.

    Args:
        values: float32 or float64, of any shape.
        bits: at most 22. A product of two then has at most 44, and float64 holds sums of 53.
        each_row: each row along the last dimension has its own unit.
    """
    low, high = values.detach().aminmax(dim=-1 if each_row else None, keepdim=each_row)
    largest = torch.maximum(-low, high)
    last_bit = torch.finfo(values.dtype).eps
    shifts = [1.5 * 2.0 ** (math.frexp(number)[1] - bits) / last_bit for number in largest.flatten().tolist()]
    # A number is faster than a tensor of one.
    shift = values.new_tensor(shifts).reshape(largest.shape) if each_row else shifts[0]
    return (values + shift).sub_(shift)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy, in float64. Its gradient has the same bytes everywhere, the loss six decimals.

    Args:
        scores: (N, classes), float32 or float64.
        labels: (N,), int64.
    """
    loss: Tensor = _CrossEntropy.apply(scores, labels)
    return loss


class _CrossEntropy(torch.autograd.Function):
    # p - 1 cancels late in training, where one bit of PyTorch's own exp would be seen; it differs between processors.

    @staticmethod
    def forward(ctx: FunctionCtx, scores: Tensor, labels: Tensor) -> Tensor:
        scores = scores.double()
        scores = scores - scores.amax(1, keepdim=True)
        powers = _exp(scores)
        *_, total = accumulate(powers.unbind(1))  # one class after the other: `sum` has an order of its own
        ctx.save_for_backward(powers, total, labels)
        return (total.log() - scores.gather(1, labels[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        powers, total, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        probabilities = powers / total[:, None]
        one_hot = functional.one_hot(labels, powers.shape[1])
        return (probabilities - one_hot) / len(labels) * gradient, None  # PyTorch rounds it to the scores' type


def _exp(x: Tensor) -> Tensor:
    """Compute ``e ** x`` for float64 x, at most 0, as ``2 ** k * e ** r``, where ``|r| <= ln(2) / 2``.

    Its relative error is below 1e-15 from -700 on; below that the result is 1e-304. The subtraction of ``k ln(2)`` in
    two parts is Cody and Waite's (Software Manual for the Elementary Functions, 1980).
    """
    x = x.clamp(min=-700)
    k = (x / (LN2_HIGH + LN2_LOW)).round()
    r = x - k * LN2_HIGH - k * LN2_LOW
    result = torch.full_like(r, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        result.mul_(r).add_(coefficient)  # two operations, each rounded: eager PyTorch fuses nothing
    return result * ((k.long() + 1023) << 52).view(torch.float64)  # 2 ** k by its exponent's bits


LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # 33 bits, so that k times it is exact
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # the rest of ln 2
TAYLOR = [1 / math.factorial(n) for n in range(13, -1, -1)]
