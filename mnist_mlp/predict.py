"""Say which digit a picture shows, by the champion: ``python -m mnist_mlp.predict IMAGE.png ...``.

Any size, any format that Pillow reads, dark on light or light on dark, one digit a picture with paper all around it.
The page may have a shadow, grain and specks of dirt. A page without a digit, or with more than a digit, is refused.
"""

import argparse
import io
import sys
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from skimage import filters, measure, morphology

from lineage import CALLER, UserError, run_command
from mnist_mlp import champion
from mnist_mlp.recipe import data

CUT = "cut the picture so that it shows one digit and plain paper all around it"
SIDE = 300  # pixels of the longer side of a page, when the digit is looked for
# Pillow warns of a picture of 89 megapixels, which a phone may take, and refuses one of 179.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def main() -> None:
    """Print path, digit and probability of each picture; one that fails gets a line on stderr, and the status is 1."""
    parser = argparse.ArgumentParser(
        prog="python -m mnist_mlp.predict", description="Say which digit each picture shows."
    )
    parser.add_argument("pictures", metavar="IMAGE", nargs="+", type=Path)
    pictures = parser.parse_args().pictures
    _, classify = champion.load()
    failed = False
    for path in pictures:
        name = str(path).encode(errors="replace").decode()  # a file's name need not be UTF-8
        try:
            probabilities = classify(as_mnist(grey_levels((CALLER / path).read_bytes()))[np.newaxis])[0]
            print(f"{name}: {probabilities.argmax()}, probability {probabilities.max():.4f}", flush=True)
        except (UserError, OSError) as error:
            failed = True
            print(f"predict: {name}: {getattr(error, 'strerror', error)}", file=sys.stderr)
    sys.exit(failed)


def grey_levels(content: bytes) -> NDArray[np.float32]:
    """Read the content of a picture's file, upright: (height, width), 0 for black to 255 for white.

    What is transparent becomes paper, white, or black where the ink is light.

    Raises:
        UserError: not a whole picture.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(content))
        if picture.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which `convert` would clip at 255
            levels = np.asarray(ImageOps.exif_transpose(picture), np.float32)
            return levels * np.float32(255 / max(levels.max(), 1))
        picture.thumbnail((4 * SIDE, 4 * SIDE))  # quicker, where a picture has megapixels
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
        opaque = np.asarray(picture.getchannel("A"), float)
        light = (np.asarray(picture.convert("L"), float) * opaque).sum() > 127 * opaque.sum()  # needs dark paper
        paper = Image.new("RGBA", picture.size, "black" if light else "white")
        return np.asarray(Image.alpha_composite(paper, picture).convert("L"), np.float32)
    except UnidentifiedImageError:
        heic = content[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif", b"ftypmsf")  # which phones take
        raise UserError("HEIC: export it as JPEG" if heic else "not a picture that Pillow can read") from None
    except (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError) as error:  # decoders differ
        raise UserError(f"not a whole picture: {error}") from None


def as_mnist(levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Make a picture of one digit into what MNIST would have made of it.

    As LeCun, Bottou, Bengio and Haffner describe it (Gradient-based learning applied to document recognition, 1998,
    section III A): size-normalised to fit a box of 20 by 20 pixels, keeping the aspect ratio, with the grey levels that
    smoothing brings, and put into 28 by 28 pixels by its centre of mass.

    Args:
        levels: (height, width), 0 for black to 255 for white. Paper is what most of the picture shows, and ink is what
            differs from the paper around it, darker or lighter.

    Returns:
        `data.SHAPE`, 0 for paper to 255 for ink.

    Raises:
        UserError: the page is blank, or what is on it is no digit or more than a digit.
    """
    ink, light = find_ink(levels)
    digit = widened(cut_out(ink, find_digit(ink, light)))
    scale = min(data.SHAPE) * 20 / 28 / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    box = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.HAMMING))
    image = np.zeros(data.SHAPE, np.uint8)
    top, left = (
        round(np.clip(whole / 2 - centre, 0, whole - side))  # MNIST has the centre of mass at [14, 14]
        for whole, centre, side in zip(data.SHAPE, ndimage.center_of_mass(box), box.shape, strict=True)
    )
    image[top : top + height, left : left + width] = np.rint(box * (255 / box.max()))
    return image


def find_ink(levels: NDArray[np.floating]) -> tuple[NDArray[np.float32], bool]:
    """Say how much of the light the ink swallows, so that it has the same value in the light and in the shadow.

    The paper is a plane, for light from one side, and what a grey closing makes of the rest: this fills whatever is
    darker and narrower than half of the page (Serra, Image analysis and mathematical morphology, 1982).

    Args:
        levels: (height, width), 0 for black to 255 for white.

    Returns:
        (height, width), of which the longer is ``SIDE``, 0 for paper to 1 for ink; and whether the ink was lighter than
        the paper.

    Raises:
        UserError: a level is not a number, or beyond a million.
    """
    if not (np.abs(levels) < 1e6).all():  # a TIFF may hold NaN, or numbers whose sums overflow
        raise UserError("not a whole picture: some of its grey levels are no numbers, or huge ones")
    height, width = (max(9, round(side * SIDE / max(levels.shape))) for side in levels.shape)
    picture = Image.fromarray(levels.astype(np.float32)).resize((width, height))
    page = np.asarray(picture)
    rough = np.asarray(picture.resize((width // 3, height // 3), Image.Resampling.BOX))  # quicker, and with less grain

    axes = np.stack([np.ones(rough.shape), *np.indices(rough.shape)], -1).reshape(-1, 3)
    plane = (axes @ np.linalg.lstsq(axes, rough.ravel())[0]).reshape(rough.shape)
    light = bool(np.median(rough - plane) < 0)  # the paper is most of the page
    if light:
        page, rough, plane = 255 - page, 255 - rough, 255 - plane
    window = (max(rough.shape) // 2,) * 2
    paper = np.minimum(ndimage.grey_closing(rough, window), plane + ndimage.grey_closing(rough - plane, window))
    paper = np.asarray(Image.fromarray(paper.astype(np.float32)).resize((width, height)))
    return np.clip((paper - page) / np.maximum(paper, 32), 0, 1).astype(np.float32), light


def find_digit(ink: NDArray[np.float32], light: bool) -> NDArray[np.bool_]:
    """Find the pieces that make up the digit: the largest, and others of a size with it.

    What touches the border and stays near it is left out, such as a desk, a frame or a thumb. Each limit lies between
    MNIST's test digits and what it has to refuse (``pytest tests/test_predict.py``).

    Args:
        ink: as ``find_ink`` gives it.
        light: likewise.

    Returns:
        (height, width), true for ink of the digit.

    Raises:
        UserError: nothing stands out from the paper, or something that the net would take for a part of the digit, or
            for the digit.
    """
    dark = ink > filters.threshold_otsu(ink)
    contrast = ink[dark].mean() - ink[~dark].mean() if dark.any() else 0
    if contrast < 0.12:  # less than the faintest pencil
        raise UserError("a blank picture: nothing on it stands out from the paper")
    if contrast < 3 * ink[~dark].std():
        raise UserError(f"no digit: there is ink all over the picture, like noise or text; {CUT}")

    indices = np.indices(ink.shape)
    from_border = np.minimum(indices, indices[:, ::-1, ::-1]).min(axis=0)
    labels = measure.label(dark)
    pieces = measure.regionprops(labels, from_border)
    if any(piece.intensity_min < 2 and piece.intensity_max > SIDE / 6 for piece in pieces):
        raise UserError(f"no margin: a line, a stroke or a thing reaches into the picture from its border; {CUT}")
    inner = [piece for piece in pieces if piece.intensity_min >= 2]
    # In MNIST, strokes can be apart, such as the bar of a 5; with a twentieth of the largest none is lost.
    largest = max((piece.area for piece in inner), default=0)
    kept = [piece for piece in inner if piece.area >= largest / 20]
    if not kept:
        raise UserError(f"no digit: there is ink only at the border; {CUT}")
    digit = np.isin(labels, [piece.label for piece in kept])
    (whole,) = measure.regionprops(digit.astype(np.uint8))
    height, width = whole.image.shape
    if max(height, width) < SIDE / 30:
        raise UserError("no digit: there is only a speck; cut the picture closer to the digit, if there is one")
    if len(kept) > 4 or sum(piece.area for piece in inner) > 1.4 * whole.area:
        raise UserError(f"no digit: there is ink all over the picture, like noise or text; {CUT}")
    # A stroke that is apart lies flat, such as the bar of a 5. So do all but 1 in 200 in MNIST.
    heights, widths = np.array([piece.image.shape for piece in kept]).T
    if (heights > 0.6 * widths).sum() > 1 or width > 1.7 * height:
        raise UserError(f"more than one digit, or a mark beside it; {CUT}")
    # On a desk that is most of the picture, the sheet looks like light ink. It is more solid than a digit is.
    broad = whole.axis_minor_length > 0.35 * whole.axis_major_length
    if broad and whole.solidity > (0.75 if light else 0.95):
        raise UserError(f"a sheet or a blot is in the picture; {CUT}")
    return digit


def cut_out(ink: NDArray[np.float32], digit: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Cut the digit out, with the soft edge of its strokes, and nothing else."""
    edged = morphology.dilation(digit, morphology.disk(SIDE // 60)) & (ink > ink[digit].max() / 5)
    rows, columns = (np.flatnonzero(edged.any(axis)) for axis in (1, 0))
    return np.where(edged, ink, np.float32(0))[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def widened(digit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Widen the strokes of a thin pen to a ninth of the digit, which is 2 of 20 pixels, as nearly all have in MNIST."""
    stroke = 2 * ndimage.distance_transform_edt(digit > digit.max() / 2).max()
    by = max(0, round((max(digit.shape) / 9 - stroke) / 2))
    wide: NDArray[np.float32] = morphology.dilation(np.pad(digit, by), morphology.disk(by))
    return wide


if __name__ == "__main__":
    run_command(main)
