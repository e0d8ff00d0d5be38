"""The figures that the tutorial prints, of each epoch."""

import csv
from pathlib import Path

import lineage
from lineage import UserError
from mnist_mlp.recipe.history import FIGURES

PUBLISHED = Path("data/published_history.csv")  # may be missing or empty


def published_history(path: Path | None = None) -> list[dict[str, float]]:
    """Read the history that the tutorial prints, one row an epoch. There is none if the file is missing or empty.

    Raises:
        UserError: the file is no table of numbers with a column for each figure.
    """
    path = path or lineage.HERE / PUBLISHED
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            history = [{name: float(row[name]) for name in ("epoch", *FIGURES)} for row in csv.DictReader(file)]
        if [row["epoch"] for row in history] != list(range(len(history))) or "nan" in str(history):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        columns = ", ".join(FIGURES)
        wanted = f"each row needs the epoch, from 0, and numbers in the columns {columns}"
        raise UserError(f"{PUBLISHED}: {wanted}; `git checkout {PUBLISHED}` restores it") from None
    return history
