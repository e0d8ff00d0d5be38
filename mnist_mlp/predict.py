"""Say which digit a picture shows, by the champion: ``python -m mnist_mlp.predict IMAGE.png ...``.

Any size, any format that Pillow reads, dark on light or light on dark, one digit a picture with paper all around it.
The page may have a shadow, grain and specks of dirt. A page without a digit, or with more than a digit, is refused.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from lineage import CALLER, UserError, run_command
from mnist_mlp import champion
from mnist_mlp.recipe import data

CUT = "cut the picture so that it shows one digit and plain paper all around it"


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
        try:
            probabilities = classify(as_mnist(grey_levels(CALLER / path))[np.newaxis])[0]
            print(f"{path}: {probabilities.argmax()}, probability {probabilities.max():.4f}", flush=True)
        except (UserError, OSError) as error:
            failed = True
            print(f"predict: {path}: {getattr(error, 'strerror', error)}", file=sys.stderr)
    sys.exit(failed)


def grey_levels(path: Path) -> NDArray[np.float32]:
    """Read a picture, upright and on white paper: (height, width), 0 for black to 255 for white.

    Raises:
        UserError: not a whole picture.
        OSError: no such file.
    """
    content = io.BytesIO(path.read_bytes())  # from memory: Pillow leaves a TIFF that it maps from disk on its side
    try:
        picture = ImageOps.exif_transpose(Image.open(content))
        if picture.mode.startswith(("I", "F")):  # more than 8 bits a pixel, which `convert` would clip at 255
            levels = np.asarray(picture, np.float32)
            return levels * np.float32(255 / max(levels.max(), 1))
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        return np.asarray(Image.alpha_composite(paper, picture).convert("L"), np.float32)
    except UnidentifiedImageError:
        raise UserError("not a picture that Pillow can read") from None
    except (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError) as error:  # decoders differ
        raise UserError(f"not a whole picture: {error}") from None


def as_mnist(levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Make a picture of one digit into what MNIST would have made of it.

    As LeCun, Bottou, Bengio and Haffner describe it (Gradient-based learning applied to document recognition, 1998,
    section III A): size-normalised to fit a box of 20 by 20 pixels, keeping the aspect ratio, with the grey levels that
    smoothing brings, and put into 28 by 28 pixels by its centre of mass. Of MNIST's own test images 98 in 100 are
    accepted, and 94 in 100 of these come out as they went in, but for the faintest greys.

    Args:
        levels: (height, width), 0 for black to 255 for white. Paper is what most of the border is, and ink is what
            differs from the paper around it, darker or lighter.

    Returns:
        `data.SHAPE`, 0 for paper to 255 for ink.

    Raises:
        UserError: the page is blank, or what is on it is no digit or more than a digit.
    """
    ink = keep_digit(find_ink(levels))
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    digit = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = min(data.SHAPE) * 20 / 28 / max(digit.size)
    width, height = (max(1, round(side * scale)) for side in digit.size)
    box = np.asarray(digit.resize((width, height), Image.Resampling.BILINEAR))
    box = box * (255 / box.max())

    image = np.zeros(data.SHAPE, np.uint8)
    centre = (np.average(index, weights=box) for index in np.indices(box.shape))  # which MNIST puts at [14, 14]
    top, left = (
        round(np.clip(whole / 2 - c, 0, whole - side))
        for whole, c, side in zip(data.SHAPE, centre, box.shape, strict=True)
    )
    image[top : top + height, left : left + width] = np.rint(box)
    return image


def find_ink(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Say how much darker each pixel is than the paper around it. Light ink on dark paper is inverted first.

    Args:
        levels: (height, width), 0 for black to 255 for white.

    Returns:
        (height, width), 0 for paper, and 51 to 255 for ink: the part of the light that the ink swallows, so the same
        ink has the same value in the light and in the shadow.

    Raises:
        UserError: a level is not a finite number, or nothing stands out from the paper.
    """
    if not np.isfinite(levels).all():  # which a TIFF may hold
        raise UserError("not a whole picture: some of its grey levels are not numbers")
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    if np.median(border) < (levels.min() + levels.max()) / 2:
        levels = 255 - levels
    paper = estimate_paper(levels)
    depth = paper - levels
    if depth.max() < 32:  # an eighth of the range: less than pencil (60 or so), more than faint grain (10)
        raise UserError("a blank picture: nothing on it stands out from its border")
    ink = np.clip(depth / np.maximum(paper, 1), 0, 1)
    ink *= 255 / ink.max()
    ink[ink < 255 / 5] = 0  # grain of the paper, and what JPEG leaves around a stroke
    return ink.astype(np.float32)


def estimate_paper(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Estimate how light the page would be without its ink.

    A grey closing fills whatever is dark and narrower than its window, and leaves wider things as they are, such as a
    shadow with an edge (Serra, Image analysis and mathematical morphology, 1982). But it also fills the dark end of a
    slope. So it is done again on the page less the plane that fits the first result best. Neither result lies below the
    page, so the lower one is nearer.

    Args:
        levels: (height, width), 0 for black to 255 for white, with dark ink.

    Returns:
        (height, width), on the same scale.
    """
    small = Image.fromarray(levels)
    small.thumbnail((100, 100), Image.Resampling.BOX)  # a shadow needs no more detail; quick, and it averages grain
    page = np.asarray(small)
    window = (max(page.shape) // 2,) * 2  # wider than any stroke, even where no margin is around the digit
    closed = ndimage.grey_closing(page, window)

    corners = np.stack([np.ones(page.shape), *np.indices(page.shape)], -1).reshape(-1, 3)  # of the least-squares fit
    plane = (corners @ np.linalg.lstsq(corners, closed.ravel())[0]).reshape(page.shape)
    paper = np.minimum(closed, plane + ndimage.grey_closing(page - plane, window)).astype(np.float32)
    return np.asarray(Image.fromarray(paper).resize(levels.shape[::-1], Image.Resampling.BILINEAR))


def keep_digit(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Keep the largest piece of ink and those of a size with it, and erase the others.

    Args:
        ink: (height, width), 0 for paper to 255 for ink, not all paper.

    Returns:
        (height, width), the same with specks made paper.

    Raises:
        UserError: what is left cannot be a digit, or is more than a digit.
    """
    pieces, _ = ndimage.label(ink, np.ones((3, 3)))  # pixels that touch at a corner belong together
    weights = np.bincount(pieces.ravel(), ink.ravel())[1:]
    # In MNIST, strokes can be apart, such as the bar of a 5. If only the largest piece stayed, 1 test digit in 400
    # would be lost. With a twentieth none is. On a page of 300 by 300 pixels, a speck of 3 by 3 is a thousandth.
    kept = np.isin(pieces, 1 + np.flatnonzero(weights >= weights.max() / 20))
    digit = np.where(kept, ink, np.float32(0))
    extent = max(np.ptp(np.flatnonzero(kept.any(axis))) + 1 for axis in (1, 0))
    if extent < max(8, max(ink.shape) / 60):  # too few pixels to show a digit; on a large picture dust has more
        raise UserError("no digit: there is only a speck; cut the picture closer to the digit, if there is one")
    # A digit has one main stroke, dark but for its edges, and lies on whole paper. Noise has not: sparse dots fail the
    # first test, faint grain the second, and dense grain, which leaves only crumbs of paper, the third. Each limit lies
    # between the worst of MNIST's 10,000 test digits and the noise that it has to refuse.
    paper_pieces, _ = ndimage.label(~kept)
    paper_sizes = np.bincount(paper_pieces.ravel())[1:]
    if (
        weights.max() < 0.4 * weights.sum()  # MNIST: 0.45 or more; dots of salt: up to 0.2
        or (digit[kept] > 255 / 2).mean() < 0.4  # MNIST: 0.41 or more; faint grain: up to 0.37
        or paper_sizes.max(initial=0) < paper_sizes.sum() / 6  # MNIST: 0.6, or 0.2 without a margin; dense grain: 0.1
    ):
        raise UserError(f"no digit: the ink is all over the picture, like noise, text or a desk; {CUT}")
    require_alone(digit)
    return digit


def require_alone(ink: NDArray[np.float32]) -> None:
    """Refuse what the net would take for a part of the digit, or for the digit itself.

    Args:
        ink: (height, width), 0 for paper to 255 for ink, without specks.

    Raises:
        UserError: something touches the border, there is a second digit, or there is a sheet or a frame.
    """
    edge = 1 + min(ink.shape) // 60  # a frame may leave a gap
    if np.count_nonzero(ink[edge:-edge, edge:-edge]) < np.count_nonzero(ink):
        raise UserError(f"no margin: a desk, a frame, a line or a stroke touches the border of the picture; {CUT}")

    # A stroke that is apart lies flat, such as the bar of a 5. So do all but 1 in 200 in MNIST.
    boxes = ndimage.find_objects(ndimage.label(ink, np.ones((3, 3)))[0])
    if sum(rows.stop - rows.start > 0.6 * (columns.stop - columns.start) for rows, columns in boxes) > 1:
        raise UserError(f"more than one digit, or a mark beside it; {CUT}")

    # Where a dark frame or desk is the whole border, the sheet looks like light ink. Turned until its sides are level,
    # a sheet or a frame fills its box. In MNIST a bold 0 fills up to 0.9 of it. A 1 may fill all: its box is narrow.
    dark = ink > 255 / 2
    (box,) = ndimage.find_objects(dark.astype(int))
    filled = ndimage.binary_fill_holes(dark[box])
    y, x = np.nonzero(filled & ~ndimage.binary_erosion(filled))
    turned = np.exp(1j * np.deg2rad(np.arange(0, 90, 3)))[:, np.newaxis] * (x + 1j * y)
    sides = 1 + np.sort([np.ptp(turned.real, axis=1), np.ptp(turned.imag, axis=1)], axis=0)
    short, long = sides[:, sides.prod(axis=0).argmin()]
    if filled.sum() > 0.9 * short * long and short > 0.4 * long:
        raise UserError(f"a sheet or a frame is in the picture; {CUT}")


if __name__ == "__main__":
    run_command(main)
