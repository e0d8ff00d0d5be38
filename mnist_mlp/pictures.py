"""How plots look, and how they become files with the same bytes everywhere."""

import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from lineage import write

STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

# A decorator for what draws: outside of it, a notebook keeps its own style. The default comes first, by name, since a
# user's own matplotlibrc would change the bytes.
styled = matplotlib.style.context(["default", STYLE])

# Okabe and Ito's colours, which people tell apart however they see colours (Color universal design, 2002).
BLACK, ORANGE, SKY_BLUE, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = map(
    mpl.colors.to_hex, mpl.colormaps["okabe_ito"](range(8))
)
PUBLISHED, OURS, TARGET = BLACK, BLUE, VERMILLION
OF_SETTINGS = (OURS, VERMILLION, GREEN, PURPLE, ORANGE, SKY_BLUE, YELLOW)  # where there are several of ours


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, without the version of the library."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    write(path, png.getvalue())


def percent(axis: mpl.axis.Axis) -> None:
    """Label an axis of fractions in percent."""
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def over_epochs(axes: Axes, name: str, last: int) -> None:
    """Give a figure of the history its axes: whole epochs, accuracies in percent, losses on a logarithmic scale.

    Args:
        axes: with the curves.
        name: of the figure, such as ``test_acc``.
        last: the last epoch, which gets a label; the first is 0.
    """
    axes.set(title=name.replace("_", " ").replace("acc", "accuracy"), xlabel="epoch")
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(0, max(last, 1))
    axes.set_xticks([*ticks[ticks <= last - np.diff(ticks)[0] / 2], last])
    if name.endswith("acc"):
        percent(axes.yaxis)
    elif np.isfinite(axes.dataLim.minposy):  # if all runs of a study diverged, there is no curve
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
