"""Pictures of digits, as a phone takes them: what `predict` makes of them, and which pages it refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mnist_mlp import UserError, data, net, params, predict, training

Page = NDArray[np.float32]
SIDE = 300  # pixels
PAPER, INK = 235.0, 20.0  # grey levels
SHADOW = np.linspace(PAPER, 150, SIDE)  # across the page


class Digits:
    """The test digits, and a net that reads 97 % of them."""

    def __init__(self, mnist: Path) -> None:
        config = params.load()
        config = config.replaced({"train.epochs": 4, "train.seed": 42, "train.device": "cpu"})
        model = training.new_model(config)
        *_, last = training.train(model, training.load(config, mnist), config)
        assert last["test_acc"] > 0.96
        self.classifier = net.ImageClassifier(model.eval(), config.data.mean, config.data.std)
        self.images, self.labels = data.load("t10k", mnist)

    def share_right(self, pages: list[Page]) -> float:
        made = np.stack([predict.as_mnist(page) for page in pages])
        with torch.no_grad():
            found = self.classifier(torch.from_numpy(made)).numpy().argmax(1)
        return float((found == self.labels[: len(pages)]).mean())


@pytest.fixture(scope="module")
def digits(mnist: Path) -> Digits:
    return Digits(mnist)


def photograph(digit: NDArray[np.uint8], paper: NDArray[np.floating] | float = PAPER) -> Page:
    """A page with the digit in dark ink, (300, 300)."""
    large = Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return as_levels(paper - np.asarray(large) / 255 * (paper - INK))


def as_levels(page: NDArray[np.floating]) -> Page:
    levels: Page = np.rint(page.clip(0, 255)).astype(np.float32)
    return levels


def with_noise(page: NDArray[np.floating], sigma: float) -> Page:
    return as_levels(page + np.random.default_rng(int(page.sum())).normal(0, sigma, page.shape))


def with_speck(page: Page) -> Page:
    page = page.copy()
    page[-3:, :3] = 0
    return page


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(photograph, id="clean"),
        pytest.param(lambda digit: 255 - photograph(digit), id="light on dark"),
        pytest.param(lambda digit: with_noise(photograph(digit), 10), id="noise"),
        pytest.param(lambda digit: photograph(digit, SHADOW), id="shadow"),
        pytest.param(lambda digit: photograph(digit, np.where(SHADOW < 190, 150.0, PAPER)), id="shadow with an edge"),
        pytest.param(lambda digit: photograph(digit) * 0.2 + SHADOW * 0.8 - 47, id="pencil in a shadow"),
        pytest.param(lambda digit: with_speck(photograph(digit)), id="speck"),
    ],
)
def test_19_of_20_photographed_digits_are_read(digits: Digits, take: Callable[[NDArray[np.uint8]], Page]) -> None:
    assert digits.share_right([take(digit) for digit in digits.images[:200]]) >= 0.95


@pytest.mark.parametrize("sigma", [0, 2, 10, 20, 40, 80])
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
    with pytest.raises(UserError, match="scattered"):
        predict.as_mnist(as_levels(np.where(dots, INK, PAPER)))


def test_a_picture_whose_levels_are_not_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="not numbers"):
        predict.as_mnist(np.full((28, 28), np.nan, np.float32))


def test_a_stroke_apart_from_the_others_stays_and_a_speck_goes() -> None:
    five = np.zeros((28, 28), np.float32)
    five[4:6, 6:20] = 255  # the bar
    five[8:24, 6:9] = 255
    five[21:24, 6:20] = 255
    expected = predict.as_mnist(five)
    assert ndimage.label(expected)[1] == 2
    speckled = five.copy()
    speckled[26, 26] = 255
    assert np.array_equal(predict.as_mnist(speckled), expected)


def test_a_digit_of_mnist_comes_out_as_it_went_in(digits: Digits) -> None:
    made = np.stack([predict.as_mnist(digit.astype(np.float32)) for digit in digits.images[:500]])
    unchanged = (np.abs(made.astype(int) - digits.images[:500]) <= 51).all((1, 2))  # a fifth: what counts as paper
    assert unchanged.mean() > 0.9


def test_ink_is_what_differs_from_the_border(digits: Digits) -> None:
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
