"""The history: what each epoch gave, as a table with six decimals."""

import csv
import io
from collections.abc import Iterable, Mapping

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
