"""How plots look, and how they become files with the same bytes everywhere."""

import io
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from lineage import write

STYLE = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}

# A decorator for what draws: outside of it, a notebook keeps its own style. The default comes first, by name, since a
# user's own matplotlibrc would change the bytes.
styled = matplotlib.style.context(["default", STYLE])


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, without the version of the library."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    write(path, png.getvalue())
