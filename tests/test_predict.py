"""Pictures of digits, as a phone takes them: what `predict` makes of them, and which pages it refuses."""

import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lineage import UserError
from mnist_mlp import params, predict
from mnist_mlp.recipe import MODEL, data, net, training
from tests.conftest import Make
from tests.pictures import INK, PAPER, READ, REFUSED, SIDE, Page, grain, read, with_specks

pytestmark = pytest.mark.recipe
QUICK = ("shadow", "two digits")
COUNT = 200  # pictures of each kind


def kinds(generators: Iterable[str]) -> list[Any]:
    """Parameters of a test: the kinds that are not in ``QUICK`` are for `make test-full`."""
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.full) for kind in generators]


@pytest.fixture(scope="module")
def classifier(mnist: Path, once: Make) -> net.ImageClassifier:
    """A net that reads 97 % of the test digits."""
    config = params.load().replaced({"model.hidden": [100], "train.epochs": 6, "train.seed": 42, "train.device": "cpu"})

    def train(folder: Path) -> None:
        model = training.new_model(config)
        *_, last = training.train(model, training.load(config, mnist), config)
        assert last["test_acc"] > 0.96
        (folder / MODEL.name).write_bytes(net.save_weights(model))

    file = once("classifier", train) / MODEL.name
    model = net.mlp(config.model.hidden)
    net.load_weights(model, file.read_bytes(), str(file))
    return net.ImageClassifier(model.eval(), config.data.mean, config.data.std)


@pytest.mark.parametrize("kind", kinds(READ))
def test_19_of_20_photographed_digits_are_read_and_few_refused(classifier: net.ImageClassifier, kind: str) -> None:
    reading = read(classifier, READ[kind], COUNT)
    assert reading.right >= 0.95 * COUNT
    assert len(reading.refusals) <= 0.02 * COUNT
    if kind == "clean":  # otherwise 'sure and wrong' would say little
        assert reading.sure_and_right >= 0.9 * COUNT


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_a_digit_that_is_not_alone_on_paper_is_right_or_refused(classifier: net.ImageClassifier, kind: str) -> None:
    reading = read(classifier, REFUSED[kind], COUNT)
    assert reading.sure_and_wrong <= 0.02 * COUNT
    assert all(predict.CUT in refusal or "blank" in refusal for refusal in reading.refusals)


@pytest.mark.parametrize("sigma", [10, *(pytest.param(sigma, marks=pytest.mark.full) for sigma in (0, 2, 20, 40, 80))])
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(np.full((SIDE, SIDE), PAPER), id="white"),
        pytest.param(np.full((SIDE, SIDE), 128.0), id="grey"),
        pytest.param(np.full((28, 28), 128.0), id="small"),
        pytest.param(np.tile(np.linspace(PAPER, 150, SIDE), (SIDE, 1)), id="shadow"),
        pytest.param(np.tile(np.linspace(PAPER, 150, SIDE), (SIDE, 1)).T, id="shadow from above"),
        pytest.param(with_specks(np.full((SIDE, SIDE), PAPER), np.random.default_rng(1)), id="specks"),
    ],
)
def test_a_page_without_a_digit_is_refused_in_one_line(page: Page, sigma: float) -> None:
    noisy = grain(page, np.random.default_rng(1), sigma).clip(0, 255)
    with pytest.raises(UserError, match=r"^(a blank picture|no digit|no margin|more than one digit).*: .+\Z"):
        predict.as_mnist(noisy)


def test_a_page_with_dots_all_over_is_refused() -> None:
    dots = np.random.default_rng(1).random((28, 28)) < 0.1
    with pytest.raises(UserError, match="all over the picture"):
        predict.as_mnist(np.where(dots, INK, PAPER))


@pytest.mark.parametrize("level", [np.nan, np.inf, -3.39e38])
def test_a_picture_whose_levels_are_no_numbers_is_refused(level: float) -> None:
    levels = np.full((28, 28), 255, np.float32)
    levels[3:9, 3:9] = level
    with pytest.raises(UserError, match="no numbers, or huge ones"):
        predict.as_mnist(levels)


def five() -> Page:
    page = np.zeros((28, 28))
    page[4:6, 6:20] = 255  # the bar, apart from the rest
    page[8:24, 6:9] = 255
    page[21:24, 6:20] = 255
    return page


def test_a_stroke_apart_from_the_others_stays_and_a_speck_goes() -> None:
    expected = predict.as_mnist(five())
    assert ndimage.label(expected > 64)[1] == 2
    speckled = five()
    speckled[26, 26] = 255
    made = predict.as_mnist(speckled)
    assert np.array_equal(made > 0, expected > 0)  # the paper's level is a little higher


def test_a_digit_cut_out_without_a_margin_needs_one() -> None:
    with pytest.raises(UserError, match=r"^no margin: .* a stroke .* from its border; .* plain paper all around it\Z"):
        predict.as_mnist(five()[:24])


def test_the_digit_fills_20_of_28_parts_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHAPE", (56, 70))
    made = predict.as_mnist(five())
    assert made.shape == (56, 70)
    assert np.ptp(np.flatnonzero(made.any(1))) + 1 == 40
    assert np.allclose(ndimage.center_of_mass(made), (28, 35), atol=0.6)


def test_a_digit_of_mnist_comes_out_nearly_as_it_went_in(mnist: Path) -> None:
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # a centre may be rounded to the next pixel
    changes = []
    for digit in data.load("t10k", mnist)[0][:100].astype(int):
        with suppress(UserError):
            made = predict.as_mnist(digit.astype(np.float32)).astype(int)
            changes.append(min(np.abs(np.roll(made, shift, (0, 1)) - digit).mean() for shift in shifts))
    assert len(changes) > 95
    assert np.mean(np.array(changes) < 10) > 0.95  # of 255; two digits differ by 22 in 95 of 100 pairs


def test_ink_is_what_differs_from_most_of_the_picture(mnist: Path) -> None:
    light = data.load("t10k", mnist)[0][0].astype(np.float32)
    expected = predict.as_mnist(light)
    assert np.array_equal(predict.as_mnist(255 - light), expected)
    for page in (90 + light / 2, np.pad(light, ((3, 90), (40, 0)))):
        assert np.abs(predict.as_mnist(page).astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "tiff") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F")]
    + [("L", "png")],  # which Pillow does not turn by itself, as it does a TIFF
)
def test_any_kind_of_picture_is_read_upright(mode: str, suffix: str, tmp_path: Path) -> None:
    levels = np.zeros((20, 30), np.uint8)
    levels[2:10, 4:8] = 255
    made = Image.fromarray(levels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera held upright: to be turned by a quarter, clockwise
    path = tmp_path / f"picture.{suffix}"
    made.save(path, exif=exif)
    assert np.array_equal(predict.grey_levels(path.read_bytes()), np.rot90(levels, -1))


def test_a_picture_of_16_bits_keeps_its_levels() -> None:
    levels = (257 * np.arange(256)).astype(np.uint16).reshape(16, 16)
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    assert np.allclose(predict.grey_levels(content.getvalue()), np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0)])
@pytest.mark.parametrize("hidden", [0, 255])
def test_what_is_transparent_is_paper_whatever_colour_it_hides(ink: int, paper: int, hidden: int) -> None:
    picture = np.full((20, 20, 4), hidden, np.uint8)
    picture[..., 3] = 0
    picture[5:15, 8:12] = [ink, ink, ink, 255]
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    expected = np.full((20, 20), paper)
    expected[5:15, 8:12] = ink
    assert np.array_equal(predict.grey_levels(content.getvalue()), expected)


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_photograph_of_a_phone_is_read_upright_and_smaller() -> None:
    levels = np.zeros((9_500, 9_500), np.uint8)  # more than Pillow takes without a warning
    levels[:4_750, :4_750] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "JPEG", exif=exif)
    read = predict.grey_levels(content.getvalue())
    assert max(read.shape) == 4 * predict.SIDE
    assert [[round(part.mean()) for part in np.hsplit(half, 2)] for half in np.vsplit(read, 2)] == [[0, 255], [0, 0]]


def test_heic_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"^HEIC: export it as JPEG\Z"):
        predict.grey_levels(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic")
    with pytest.raises(UserError, match=r"^not a picture"):
        predict.grey_levels(b"\0\0\0\x1cftypisom\0\0\0\0mp42")
