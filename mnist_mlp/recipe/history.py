"""The history: what each epoch gave, as a table with six decimals."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from lineage import HERE, UserError
from mnist_mlp.recipe import PUBLISHED

FIGURES = ("train_loss", "train_acc", "test_loss", "test_acc")  # of each epoch; and val_loss, val_acc


def rounded(figures: Mapping[str, float]) -> dict[str, str]:
    """Round figures to the six decimals that the files of results have."""
    return {name: f"{value:.6f}" for name, value in figures.items()}


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> str:
    """Write rows as the content of a CSV file; what a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def published_history(path: Path = HERE / PUBLISHED) -> list[dict[str, float]]:
    """Read the history that the tutorial prints, one row an epoch. There is none if the file is missing or empty.

    Raises:
        UserError: the file is no table of numbers with a column for each figure.
    """
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
