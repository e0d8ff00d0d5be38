"""How plots look, and how they become files with the same bytes everywhere."""

import io
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")  # no screen needed

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mnist_mlp import write

STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

plt.style.use(["default", STYLE])  # by name: a user's own matplotlibrc would change the bytes


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, without the version of the library."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    write(path, png.getvalue())
    plt.close(figure)
