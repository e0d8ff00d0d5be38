"""Exact sums: each against Python's integers, which have no limit, and in any order."""

import math
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
import torch
from torch import Tensor

import lineage
from mnist_mlp.recipe import exact, training
from tests import project

pytestmark = pytest.mark.recipe
ROWS, OUTPUTS = 6, 5
LENGTHS = [1, 10, 64, 100, 128, 512, 513, 784, 4096]  # of a sum


def equal_signs(*shape: int) -> Tensor:
    """All within an eighth of the largest: nothing cancels, and the sums become as large as they can."""
    return 1 - torch.rand(shape) / 8


KINDS: dict[str, Callable[..., Tensor]] = {
    "equal signs": equal_signs,
    "normal": torch.randn,
    "zeros": lambda *shape: torch.randn(shape) * (torch.rand(shape) < 0.2),
    "subnormal": lambda *shape: torch.randn(shape) * 2.0**-135,
    "huge": lambda *shape: equal_signs(*shape) * 2.0**100,
    "far apart": lambda *shape: torch.randn(shape) * 2.0 ** torch.randint(-40, 40, shape),
}


def layer(inputs: int, weight: Tensor, bias: Tensor | None) -> exact.Linear:
    made = exact.Linear(inputs, len(weight), bias=bias is not None)
    made.weight.data = weight
    if bias is not None:
        made.bias.data = bias
    return made


def integers(values: Tensor, bits: int) -> tuple[list[list[int]], Fraction]:
    """Round to a unit ``bits`` bits below the largest, ties to even, as fractions do: how many units, and the unit."""
    rows = values.tolist()
    unit = Fraction(2) ** (math.frexp(max(abs(value) for row in rows for value in row))[1] - bits)
    return [[round(Fraction(value) / unit) for value in row] for row in rows], unit


def product(a: Tensor, b: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """Compute ``a @ b.T + bias`` in integers; the sum is a float64 then, the bias is added, the result a float32."""
    (left, left_unit), (right, right_unit) = integers(a, bits), integers(b, bits)
    sums = [[sum(map(int.__mul__, row, column)) for column in right] for row in left]
    assert max(abs(value) for row in sums for value in row) <= 2**53
    exactly = np.array([[float(value * left_unit * right_unit) for value in row] for row in sums])
    with np.errstate(over="ignore"):
        return torch.from_numpy((exactly + (0.0 if bias is None else bias.double().numpy())).astype(np.float32))


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize(
    ("kind", "length"), [*(("equal signs", length) for length in LENGTHS), *((kind, 784) for kind in [*KINDS][1:])]
)
def test_a_layer_and_its_gradients_are_the_sums_of_integers(kind: str, length: int) -> None:
    """Of 22 bits for sums of up to 512 terms, and one bit less for each four times as many."""
    torch.manual_seed(length)
    bits = 22 - sum(length > limit for limit in (512, 2048))
    draw = KINDS[kind]
    inputs, weight, bias = draw(ROWS, length), draw(OUTPUTS, length), 1e-6 * torch.randn(OUTPUTS)
    inputs.requires_grad_()
    model = layer(length, weight, bias)
    scores = model(inputs)
    assert same_bits(scores.detach(), product(inputs.detach(), weight, bits, bias))

    gradient = torch.randn(ROWS, OUTPUTS)
    scores.backward(gradient)
    assert same_bits(inputs.grad, product(gradient, weight.t(), bits))
    assert same_bits(model.weight.grad, product(gradient.t(), inputs.detach().t(), bits))
    assert same_bits(model.bias.grad, product(torch.ones(1, ROWS), gradient.t(), bits)[0])

    with torch.no_grad():
        rows = [product(row[None], weight, bits, bias) for row in inputs]
        assert same_bits(model(inputs), torch.cat(rows))


@pytest.mark.parametrize("length", LENGTHS)
def test_terms_that_cancel_leave_nothing_behind_in_any_order(length: int) -> None:
    """Inexact sums of large terms would: each has a partner of the other sign, often far away."""
    torch.manual_seed(length)
    for order in (torch.arange(2 * length), torch.randperm(2 * length)):
        inputs, weight, bias = equal_signs(ROWS, length), equal_signs(400, length), 1e-6 * torch.randn(400)
        model = layer(2 * length, weight.repeat(1, 2)[:, order], bias)
        pairs = torch.cat([inputs, -inputs], 1)[:, order]
        assert same_bits(model(pairs).detach(), bias.repeat(ROWS, 1))

        signs = torch.tensor([1.0, -1.0]).repeat_interleave(length)[order][:, None]
        # In the gradients: a sum over the outputs, and two over the batch.
        model = layer(7, equal_signs(1, 7).repeat(2 * length, 1), None)
        image = equal_signs(1, 7).requires_grad_()
        model(image).backward(signs.t() * equal_signs(1, length).repeat(1, 2)[:, order])
        assert same_bits(image.grad, torch.zeros(1, 7))
        model = layer(7, equal_signs(OUTPUTS, 7), torch.zeros(OUTPUTS))
        model(equal_signs(length, 7).repeat(2, 1)[order]).backward(signs * equal_signs(1, OUTPUTS))
        assert same_bits(model.weight.grad, torch.zeros(OUTPUTS, 7))
        assert same_bits(model.bias.grad, torch.zeros(OUTPUTS))


def test_the_gradient_of_cross_entropy_is_that_of_single_operations_in_their_order() -> None:
    """Python's floats are IEEE 754's, too."""

    def exp(x: float) -> float:
        k = round(x / (exact.LN2_HIGH + exact.LN2_LOW))
        r = x - k * exact.LN2_HIGH - k * exact.LN2_LOW
        return math.ldexp(reduce(lambda result, coefficient: result * r + coefficient, exact.TAYLOR), k)

    torch.manual_seed(1)
    scores, labels = 8 * torch.randn(64, 10, dtype=torch.float64), torch.randint(10, (64,))
    exact.cross_entropy(scores.requires_grad_(), labels).backward()
    assert scores.grad is not None
    for row, label, gradient in zip(scores.tolist(), labels.tolist(), scores.grad.tolist(), strict=True):
        powers = [exp(score - max(row)) for score in row]
        total = reduce(lambda left, right: left + right, powers)
        assert gradient == [(power / total - (digit == label)) / 64 for digit, power in enumerate(powers)]


def test_a_sum_of_zeros_is_a_positive_zero() -> None:
    """The libraries differ: -1 times 0 is -0 where nothing is added to it."""
    images, model = -torch.ones(1, 7), layer(7, torch.ones(4, 7), None)
    model(images).backward(torch.zeros(1, 4))
    assert same_bits(model.weight.grad, torch.zeros(4, 7))
    assert same_bits(layer(1, torch.zeros(4, 1), None)(-torch.ones(3, 1)).detach(), torch.zeros(3, 4))


def test_the_scores_of_an_image_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(exact.Linear(784, 100), torch.nn.ReLU(), exact.Linear(100, 10))
    images = torch.randn(128, 784) * torch.logspace(-3, 3, 128)[:, None]
    together, *others = (training.score(model, images, batch_size) for batch_size in (128, 32, 1))
    assert all(same_bits(together, other) for other in others)


def test_the_gradient_of_cross_entropy_is_the_true_one() -> None:
    """As 50 decimal digits give it, with scores from equal to so far apart that all but one probability vanish."""
    torch.manual_seed(1)
    scores = (torch.randn(200, 10).double() * torch.logspace(-6, 3.5, 200)[:, None]).requires_grad_()
    labels = torch.randint(10, (200,))
    loss = exact.cross_entropy(scores, labels)
    loss.backward()
    assert scores.grad is not None
    with localcontext() as context:
        context.prec = 50
        losses, gradients = [], []
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            powers = [Decimal(score).exp() for score in row]
            total = sum(powers, Decimal(0))
            losses.append(total.ln() - Decimal(row[label]))
            gradients.append([float((power / total - (k == label)) / 200) for k, power in enumerate(powers)])
        assert loss.item() == pytest.approx(float(sum(losses) / 200), rel=1e-14)
    assert np.allclose(scores.grad.numpy(), gradients, rtol=1e-14, atol=1e-18)

    rounded = scores.detach().float().requires_grad_()
    exact.cross_entropy(rounded, labels).backward()
    in_float64 = rounded.detach().double().requires_grad_()
    exact.cross_entropy(in_float64, labels).backward()
    assert in_float64.grad is not None
    assert same_bits(rounded.grad, in_float64.grad.float())


def digest_of_a_gradient() -> str:
    """Of cross-entropy, where all labels are nearly certain, so that p - 1 cancels, as late in training."""
    scores = torch.rand(10_000, 10, generator=torch.Generator().manual_seed(1))
    scores[:, 0] += 20
    scores.requires_grad_()
    exact.cross_entropy(scores, torch.zeros(10_000, dtype=torch.long)).backward()
    assert scores.grad is not None
    return lineage.md5(scores.grad.numpy().tobytes())


def test_other_instructions_of_a_processor_give_the_same_gradient_of_cross_entropy() -> None:
    """PyTorch's own differs here, because each set of instructions has an `exp` of its own."""
    program = "from tests import test_exact; print(test_exact.digest_of_a_gradient())"
    env = project.environment(ATEN_CPU_CAPABILITY="default")
    assert (
        project.run(project.REPOSITORY, sys.executable, "-c", program, env=env).stdout.strip() == digest_of_a_gradient()
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**127.5])
def test_what_is_no_number_or_too_large_does_not_become_an_ordinary_number(bad: float) -> None:
    """So the loss shows it, and training ends as diverged."""
    torch.manual_seed(1)
    inputs, model = torch.randn(4, 6), exact.Linear(6, 3)
    inputs[1, 2] = bad
    assert not model(inputs)[1].isfinite().any()
    with torch.no_grad():
        assert not model(inputs)[1].isfinite().any()
    scores = torch.randn(4, 3)
    scores[1, 2] = bad
    assert not exact.cross_entropy(scores, torch.tensor([0, 1, 0, 1])).item() <= training.DIVERGED
