"""Say which digit a picture shows, by the champion: ``python -m stages.predict IMAGE.png ...``.

Any size, any format that Pillow reads, dark on light or light on dark, one digit a picture.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from stages import StageError, champion, run


def main() -> None:
    """Print path, digit and probability of each picture; one that fails gets a line on stderr, and the status is 1."""
    parser = argparse.ArgumentParser(prog="python -m stages.predict", description="Say which digit each picture shows.")
    parser.add_argument("pictures", metavar="IMAGE", nargs="+", type=Path)
    pictures = parser.parse_args().pictures
    classify = champion.load()
    failed = False
    for path in pictures:
        try:
            probabilities = classify(as_mnist(grey_levels(path))[np.newaxis])[0]
            print(f"{path}: {probabilities.argmax()}, probability {probabilities.max():.4f}", flush=True)
        except (StageError, OSError) as error:
            failed = True
            print(f"predict: {path}: {getattr(error, 'strerror', error)}", file=sys.stderr)
    sys.exit(failed)


def grey_levels(path: Path) -> NDArray[np.float32]:
    """Read a picture, upright and on white paper: (height, width), 0 for black to 255 for white.

    Raises:
        StageError: not a whole picture.
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
        raise StageError("not a picture that Pillow can read") from None
    except (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError) as error:  # decoders differ
        raise StageError(f"not a whole picture: {error}") from None


def as_mnist(levels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Make a picture of one digit into what MNIST would have made of it.

    As LeCun, Bottou, Bengio and Haffner describe it (Gradient-based learning applied to document recognition, 1998,
    section III A): size-normalised to fit a box of 20 by 20 pixels, keeping the aspect ratio, with the grey levels that
    smoothing brings, and put into 28 by 28 pixels by its centre of mass. Of MNIST's own test images 96 in 100 come
    out as they went in, but for the faintest greys.

    Args:
        levels: (height, width), 0 for black to 255 for white. Paper is what most of the border is, and ink is what
            differs from it, darker or lighter.

    Returns:
        (28, 28), 0 for paper to 255 for ink.

    Raises:
        StageError: nothing stands out from the paper.
    """
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    ink = np.abs(levels - np.median(border))
    if not ink.max() >= 32:  # nor where it is not a number, which a TIFF may hold
        raise StageError("a blank picture: nothing on it stands out from its border")
    ink *= 255 / ink.max()
    ink[ink < 255 / 5] = 0  # shadows and grain of the paper, and what JPEG leaves around a stroke

    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    digit = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = 20 / max(digit.size)
    width, height = (max(1, round(side * scale)) for side in digit.size)
    box = np.asarray(digit.resize((width, height), Image.Resampling.BILINEAR))
    box = box * (255 / box.max())

    image = np.zeros((28, 28), np.uint8)
    centre = (np.average(index, weights=box) for index in np.indices(box.shape))  # which MNIST puts at [14, 14]
    top, left = (round(np.clip(14 - c, 0, 28 - side)) for c, side in zip(centre, box.shape, strict=True))
    image[top : top + height, left : left + width] = np.rint(box)
    return image


if __name__ == "__main__":
    run(main)
