"""Pictures of digits, as a phone or a scanner takes them: those to read, and those to read or to refuse.

``python -m tests.pictures`` prints what the net in ``results/`` makes of 200 pictures of each kind.
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage import morphology

from lineage import UserError
from mnist_mlp import params, predict
from mnist_mlp.recipe import MODEL, data, net

Digit = NDArray[np.uint8]
Page = NDArray[np.float64]
SIDE = 300  # pixels
PAPER, INK = 235.0, 25.0  # grey levels


def pen(digit: Digit) -> Page:
    """A test digit as a pen writes it: (SIDE, SIDE), 0 for paper to 1 for ink."""
    large = np.asarray(Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64) / 255
    return np.clip((large - 0.45) * SIDE / 42 + 0.5, 0, 1)


def thin_pen(digit: Digit) -> Page:
    """Its middle lines, drawn with a round pen."""
    lines = morphology.skeletonize(np.pad(pen(digit) > 0.5, 30))
    drawn = morphology.dilation(lines, morphology.disk(1)).astype(np.float64)
    return np.asarray(Image.fromarray(255 * drawn).resize((SIDE, SIDE))) / 255.0


def thick_pen(digit: Digit) -> Page:
    drawn: Page = morphology.dilation(pen(digit), morphology.disk(8))
    return drawn


def write(ink: Page, paper: Page | float = PAPER, level: float = INK) -> Page:
    return paper * (1 - ink) + level * ink


def grain(page: Page, random: Generator, sigma: float = 4) -> Page:
    return page + random.normal(0, sigma, page.shape)


def slope(random: Generator) -> Page:
    """From 0 to 1 across the page, in any direction."""
    y, x = np.indices((SIDE, SIDE)) / SIDE - 0.5
    angle = random.uniform(0, 2 * np.pi)
    made: Page = np.clip(0.5 + (x * np.cos(angle) + y * np.sin(angle)) * 0.8, 0, 1)
    return made


def with_specks(page: Page, random: Generator) -> Page:
    page = page.copy()
    y, x = np.indices(page.shape)
    for _ in range(random.integers(5, 15)):
        row, column = random.integers(0, SIDE, 2)
        page[(y - row) ** 2 + (x - column) ** 2 < random.uniform(1, 3) ** 2] = 50
    return page


def on_transparent(ink: Page, level: float) -> Page:
    return np.dstack([np.full((SIDE, SIDE, 3), level), 255 * ink])


def framed(page: Page, random: Generator) -> Page:
    framed = np.pad(page, random.choice([1, 3, 8]), constant_values=60.0)
    return 255 - framed if random.random() < 0.3 else framed


def desk(page: Page, random: Generator, around: bool) -> Page:
    """A desk of any shade beside the sheet, or all around it."""
    level = random.choice([60.0, 110.0, 150.0, 180.0])
    sides = random.integers(20, 150, 4) if around else np.eye(4, dtype=int)[random.integers(4)] * 60
    return grain(np.pad(page, sides.reshape(2, 2), constant_values=level), random)


def scanned(page: Page, random: Generator) -> Page:
    """With the dark bar of the scanner's lid at a side."""
    sides = np.zeros((2, 2), int)
    sides[random.integers(2), random.integers(2)] = random.integers(4, 16)
    return np.pad(page, sides, constant_values=35.0)


def with_thumb(page: Page, random: Generator) -> Page:
    page = page.copy()
    y, x = np.indices(page.shape) / SIDE
    page[((x - random.uniform(0.2, 0.8)) / 0.13) ** 2 + ((y - 1) / random.uniform(0.1, 0.3)) ** 2 < 1] = 160
    return page


def ruled(page: Page, random: Generator, squared: bool) -> Page:
    """With printed lines, light or dark, behind the ink."""
    level, every, width = random.uniform(60, 200), random.integers(25, 80), random.integers(1, 4)
    lines = (np.arange(SIDE) + random.integers(every)) % every < width
    page = page.copy()
    page[lines] = page[lines].clip(max=level)
    if squared:
        page[:, lines] = page[:, lines].clip(max=level)
    return page


def falling_off(page: Page, random: Generator) -> Page:
    """Darker to the corners, as under a lamp, or by a cheap lens."""
    y, x = np.indices(page.shape) / SIDE - 0.5
    made: Page = page * (1 - random.uniform(0.5, 1.2) * (x**2 + y**2) * 1.2)
    return made


def side_by_side(digits: Sequence[Digit]) -> Page:
    """Written next to each other, as close as people write."""
    inks = [pen(digit) for digit in digits]
    inks = [ink[:, ink.any(0)] for ink in inks]
    gap = np.zeros((SIDE, 12))
    row = np.hstack([part for ink in inks for part in (gap, ink)] + [gap])
    border = np.zeros((row.shape[0], 40))
    return write(np.hstack([border, row, border]))


def coloured(ink: Page, random: Generator) -> Page:
    """Green ink on red paper, or the like, of nearly equal lightness."""
    paper, pigment = np.array([220.0, 90, 90]), np.array([60.0, 150, 110]) + random.uniform(-15, 15)
    made: Page = paper + (pigment - paper) * ink[..., None]
    return made


def turned(ink: Page, random: Generator) -> Page:
    """By 30 degrees to either side."""
    whole = Image.fromarray(np.rint(255 * ink).astype(np.uint8))
    return np.asarray(whole.rotate(random.choice([-30, 30]), Image.Resampling.BICUBIC)) / 255.0


def european_one(random: Generator) -> Page:
    """With an upstroke as long as a third to two thirds of the downstroke."""
    page = Image.new("L", (SIDE, SIDE))
    top, bottom = (170 + random.uniform(-5, 25), 60), (165 + random.uniform(-15, 15), 240)
    long = random.uniform(60, 120)
    start = (top[0] - 0.7 * long, top[1] + 0.7 * long)
    ImageDraw.Draw(page).line([start, top, bottom], fill=255, width=int(random.integers(12, 22)), joint="curve")
    return np.asarray(page) / 255.0


# Each makes a picture from three digits, of which most kinds need only the first.
Kind = Callable[[Sequence[Digit], Generator], NDArray[np.floating]]
READ: dict[str, Kind] = {
    "clean": lambda digits, _: write(pen(digits[0])),
    "noise": lambda digits, random: grain(write(pen(digits[0])), random, random.uniform(5, 25)),
    "shadow": lambda digits, random: write(pen(digits[0])) * (1 - 0.5 * slope(random)),
    "shadow with an edge": lambda digits, random: write(pen(digits[0])) * np.where(slope(random) < 0.5, 1, 0.65),
    "pencil in a shadow": lambda digits, random: write(pen(digits[0]), level=170) * (1 - 0.4 * slope(random)),
    "specks": lambda digits, random: with_specks(write(pen(digits[0])), random),
    "thin pen": lambda digits, random: grain(write(thin_pen(digits[0])), random),
    "thick pen": lambda digits, _: write(thick_pen(digits[0])),
    "light on dark": lambda digits, random: grain(write(pen(digits[0]), 40, 220), random),
    "dark on transparent": lambda digits, _: on_transparent(pen(digits[0]), 20),
    "light on transparent": lambda digits, _: on_transparent(pen(digits[0]), 240),
}
REFUSED: dict[str, Kind] = {
    "frame": lambda digits, random: framed(write(pen(digits[0])), random),
    "desk at a side": lambda digits, random: desk(write(pen(digits[0])), random, around=False),
    "desk all around": lambda digits, random: desk(write(pen(digits[0])), random, around=True),
    "bar of a scanner": lambda digits, random: scanned(write(pen(digits[0])), random),
    "thumb": lambda digits, random: with_thumb(write(pen(digits[0])), random),
    "ruled paper": lambda digits, random: ruled(write(pen(digits[0])), random, squared=False),
    "squared paper": lambda digits, random: ruled(write(pen(digits[0])), random, squared=True),
    "light that falls off": lambda digits, random: falling_off(grain(write(pen(digits[0])), random), random),
    "two digits": lambda digits, _: side_by_side(digits[:2]),
    "two digits, one above the other": lambda digits, _: side_by_side([digit.T for digit in digits[:2]]).T,
    "three digits": lambda digits, _: side_by_side(digits),
    "colours of equal lightness": lambda digits, random: coloured(pen(digits[0]), random),
}
# What remains: many of these are read wrong.
LIMITS: dict[str, Kind] = {
    "turned by 30 degrees": lambda digits, random: write(turned(pen(digits[0]), random)),
    "1 with a long upstroke": lambda _, random: write(european_one(random)),
}


class Reading(NamedTuple):
    """What a net has made of the pictures of one kind."""

    right: int
    sure_and_right: int  # with a probability above 0.9
    sure_and_wrong: int
    refusals: list[str]


def read(classifier: torch.nn.Module, kind: Kind, count: int = 200) -> Reading:
    """Read pictures of the first test digits."""
    images, labels = data.load("t10k")
    if kind is LIMITS["1 with a long upstroke"]:
        labels = np.ones_like(labels)
    made, refusals = {}, []
    for index in range(count):
        try:
            content = picture(kind, [*images[index : index + 3]], index)
            made[index] = predict.as_mnist(predict.grey_levels(content))
        except UserError as error:
            refusals.append(str(error))
    batch = np.array(list(made.values()), np.uint8).reshape(-1, *data.SHAPE)
    with torch.no_grad():
        probability, found = (result.numpy() for result in classifier(torch.from_numpy(batch)).max(1))
    right, sure = found == labels[np.array(list(made), int)], probability > 0.9
    return Reading(right.sum(), (right & sure).sum(), (~right & sure).sum(), refusals)


def picture(kind: Kind, digits: Sequence[Digit], number: int) -> bytes:
    """The file of a picture, as PNG; `number` decides on all that is random."""
    content = io.BytesIO()
    levels = kind(digits, np.random.default_rng(number))
    Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8)).save(content, "PNG", compress_level=1)
    return content.getvalue()


def main() -> None:
    """Print a table."""
    config = params.load()
    model = net.mlp(config.model.hidden)
    net.load_weights(model, MODEL.read_bytes(), str(MODEL))
    classifier = net.ImageClassifier(model.eval(), config.data.mean, config.data.std)
    print(f"{'of 200 pictures':33s} {'right':>6s} {'refused':>8s} {'sure and wrong':>15s}")
    for name, kind in (READ | REFUSED | LIMITS).items():
        found = read(classifier, kind)
        print(f"{name:33s} {found.right:6d} {len(found.refusals):8d} {found.sure_and_wrong:15d}", flush=True)


if __name__ == "__main__":
    main()
