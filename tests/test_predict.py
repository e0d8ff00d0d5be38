"""Pictures of digits, as a phone takes them: what `predict` makes of them, and which pages it refuses."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from lineage import UserError
from mnist_mlp import params, predict
from mnist_mlp.recipe import data, net, training
from tests.pictures import (
    INK,
    PAPER,
    READ,
    REFUSED,
    SHADOW,
    SIDE,
    Digit,
    Page,
    as_levels,
    photograph,
    with_noise,
    with_speck,
)

pytestmark = pytest.mark.recipe
QUICK = ("noise", "shadow", "frame of 1 pixel", "dark desk at one side", "two digits side by side")


def kinds(generators: Iterable[str]) -> list[Any]:
    """Parameters of a test: the kinds that are not in ``QUICK`` are for `make test-full`."""
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full) for kind in generators]


class Reading(NamedTuple):
    right: int
    sure_and_wrong: int
    refusals: list[str]


class Digits:
    """The test digits, and a net that reads 97 % of them."""

    def __init__(self, mnist: Path) -> None:
        config = params.load()
        config = config.replaced({"model.hidden": [100], "train.epochs": 6, "train.seed": 42, "train.device": "cpu"})
        model = training.new_model(config)
        *_, last = training.train(model, training.load(config, mnist), config)
        assert last["test_acc"] > 0.96
        self.classifier = net.ImageClassifier(model.eval(), config.data.mean, config.data.std)
        self.images, self.labels = data.load("t10k", mnist)
        self.pages = [photograph(digit)[::2, ::2] for digit in self.images[:101]]

    def read(self, pages: list[Page]) -> Reading:
        """Read pages with the first test digits."""
        made, refusals = normalise(pages)
        images = np.array(list(made.values()), np.uint8).reshape(-1, *data.SHAPE)
        with torch.no_grad():
            probability, found = (result.numpy() for result in self.classifier(torch.from_numpy(images)).max(1))
        right = found == self.labels[np.array(list(made), int)]
        return Reading(right.sum(), (~right & (probability > 0.9)).sum(), refusals)


def normalise(pages: list[Page]) -> tuple[dict[int, Digit], list[str]]:
    """What `predict` makes of each page that it accepts, by its index, and what it says of the others."""
    made, refusals = {}, []
    for index, page in enumerate(pages):
        try:
            made[index] = predict.as_mnist(page)
        except UserError as error:
            refusals.append(str(error))
    return made, refusals


@pytest.fixture(scope="module")
def digits(mnist: Path) -> Digits:
    return Digits(mnist)


@pytest.mark.parametrize("kind", kinds(READ))
def test_19_of_20_photographed_digits_are_read_and_few_refused(digits: Digits, kind: str) -> None:
    reading = digits.read([READ[kind](digit) for digit in digits.images[:200]])
    assert reading.right >= 190
    assert len(reading.refusals) <= 4


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_a_digit_that_is_not_alone_on_paper_is_right_or_refused(digits: Digits, kind: str) -> None:
    reading = digits.read([REFUSED[kind](*pair) for pair in itertools.pairwise(digits.pages)])
    assert reading.sure_and_wrong <= 2
    assert all(predict.CUT in refusal for refusal in reading.refusals)


@pytest.mark.parametrize("sigma", [10, *(pytest.param(sigma, marks=pytest.mark.full) for sigma in (0, 2, 20, 40, 80))])
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(np.full((SIDE, SIDE), PAPER), id="white"),
        pytest.param(np.full((SIDE, SIDE), 128.0), id="grey"),
        pytest.param(np.full((28, 28), 128.0), id="small"),
        pytest.param(np.tile(SHADOW, (SIDE, 1)), id="shadow"),
        pytest.param(np.tile(SHADOW, (SIDE, 1)).T, id="shadow from above"),
        pytest.param(with_speck(np.full((SIDE, SIDE), PAPER, np.float32)), id="speck"),
    ],
)
def test_a_page_without_a_digit_is_refused_in_one_line(page: Page, sigma: float) -> None:
    with pytest.raises(UserError, match=r"^(a blank picture|no digit): .+\Z"):
        predict.as_mnist(with_noise(page, sigma))


def test_a_page_with_dots_all_over_is_refused() -> None:
    dots = np.random.default_rng(1).random((28, 28)) < 0.1
    with pytest.raises(UserError, match="all over the picture"):
        predict.as_mnist(as_levels(np.where(dots, INK, PAPER)))


def test_a_picture_whose_levels_are_not_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="not numbers"):
        predict.as_mnist(np.full((28, 28), np.nan, np.float32))


def five() -> Page:
    page = np.zeros((28, 28), np.float32)
    page[4:6, 6:20] = 255  # the bar, apart from the rest
    page[8:24, 6:9] = 255
    page[21:24, 6:20] = 255
    return page


def test_a_stroke_apart_from_the_others_stays_and_a_speck_goes() -> None:
    expected = predict.as_mnist(five())
    assert ndimage.label(expected)[1] == 2
    speckled = five()
    speckled[26, 26] = 255
    assert np.array_equal(predict.as_mnist(speckled), expected)


def test_a_digit_cut_out_without_a_margin_needs_one() -> None:
    with pytest.raises(UserError, match=r"^no margin: .* a stroke touches the border .* plain paper all around it\Z"):
        predict.as_mnist(five()[:24])


def test_the_digit_fills_20_of_28_parts_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHAPE", (56, 70))
    made = predict.as_mnist(five())
    assert made.shape == (56, 70)
    assert np.ptp(np.flatnonzero(made.any(1))) + 1 == 40
    assert np.allclose(ndimage.center_of_mass(made), (28, 35), atol=0.6)


def test_a_digit_of_mnist_comes_out_as_it_went_in(digits: Digits) -> None:
    made, _ = normalise([digit.astype(np.float32) for digit in digits.images[:500]])
    changes = [np.abs(image.astype(int) - digits.images[index]).max() for index, image in made.items()]
    assert np.mean(np.array(changes) <= 51) > 0.9  # a fifth: what counts as paper


def test_ink_is_what_differs_from_most_of_the_picture(digits: Digits) -> None:
    light = digits.images[0].astype(np.float32)
    expected = predict.as_mnist(light)
    for picture in (255 - light, 90 + light / 2, np.pad(light, ((3, 90), (40, 0)))):
        assert np.abs(predict.as_mnist(picture).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "tiff") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")]
    + [("L", "png")],  # which Pillow does not turn by itself, as it does a TIFF
)
def test_any_kind_of_picture_is_read_upright(mode: str, suffix: str, tmp_path: Path) -> None:
    levels = np.zeros((20, 30), np.uint8)
    levels[2:10, 4:8] = 255
    picture = (
        Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera held upright: to be turned by a quarter, clockwise
    path = tmp_path / f"picture.{suffix}"
    picture.save(path, exif=exif)
    assert np.array_equal(predict.grey_levels(path), np.rot90(levels, -1))
