"""Pictures of digits, as a phone or a scanner takes them: those to read, and those to refuse."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Digit = NDArray[np.uint8]
Page = NDArray[np.float32]
SIDE = 300  # pixels
PAPER, INK = 235.0, 20.0  # grey levels
SHADOW = np.linspace(PAPER, 150, SIDE)  # across the page


def photograph(digit: Digit, paper: NDArray[np.floating] | float = PAPER) -> Page:
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


def with_line(page: Page) -> Page:
    """A ruled line that the digit crosses."""
    page = page.copy()
    page[len(page) // 2 :][:4] = 60
    return page


def with_thumb(page: Page) -> Page:
    y, x = np.indices(page.shape) / len(page)
    return np.where(((x - 0.3) / 0.13) ** 2 + ((y - 1) / 0.23) ** 2 < 1, np.float32(160), page)


def beside(page: Page, width: int | tuple[tuple[int, int], tuple[int, int]], level: float) -> Page:
    """The page and what is around it: `width` pixels of it, as `np.pad` takes them."""
    return with_noise(np.pad(page, width, constant_values=level), 4)


READ: dict[str, Callable[[Digit], Page]] = {
    "clean": photograph,
    "light on dark": lambda digit: 255 - photograph(digit),
    "noise": lambda digit: with_noise(photograph(digit), 10),
    "shadow": lambda digit: photograph(digit, SHADOW),
    "shadow with an edge": lambda digit: photograph(digit, np.where(SHADOW < 190, 150.0, PAPER)),
    "pencil in a shadow": lambda digit: as_levels(photograph(digit) * 0.2 + SHADOW * 0.8 - 47),
    "speck": lambda digit: with_speck(photograph(digit)),
}

# Of two pages (150, 150), of which most kinds need only the first.
REFUSED: dict[str, Callable[[Page, Page], Page]] = {
    "frame of 1 pixel": lambda page, _: np.pad(page, 1, constant_values=60),
    "frame of 3 pixels": lambda page, _: np.pad(page, 3, constant_values=60),
    "frame of 8 pixels, light on dark": lambda page, _: 255 - np.pad(page, 8, constant_values=60),
    "dark desk at one side": lambda page, _: beside(page, ((0, 0), (30, 0)), 71),
    "dark desk all around": lambda page, _: beside(page, 20, 71),
    "large dark desk all around": lambda page, _: beside(page, 50, 71),
    "light desk at one side": lambda page, _: beside(page, ((0, 0), (30, 0)), 172),
    "light desk all around": lambda page, _: beside(page, 20, 172),
    "lid of a scanner": lambda page, _: beside(page, ((0, 0), (0, 4)), 35),
    "thumb": lambda page, _: with_thumb(page),
    "ruled line": lambda page, _: with_line(page),
    "two digits side by side": lambda page, other: np.hstack([page[:, :-15], other[:, 15:]]),
    "two digits, one above the other": lambda page, other: np.vstack([page[:-15], other[15:]]),
}
