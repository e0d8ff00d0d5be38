"""Draw the tutorial's four plots, ours beside the published ones, the confusion matrix and the worst mistakes."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lineage import UserError, lock, run_command
from mnist_mlp import params, pictures
from mnist_mlp.published import published_history
from mnist_mlp.recipe import HISTORY, PLOTS, PREDICTIONS, data
from mnist_mlp.recipe.history import FIGURES


@pictures.styled
def main() -> None:
    """Draw six plots."""
    config = params.load()
    ours, predictions = read(HISTORY), read(PREDICTIONS)
    images, _ = data.load("t10k")

    plots = {name: curves(name, ours, published_history()) for name in FIGURES}
    plots["confusion_matrix"] = confusion_matrix(
        predictions["actual"].astype(int), predictions["predicted"].astype(int)
    )
    plots["wrong_digits"] = wrong_digits(images, predictions, config.plot.wrong_digits)
    for name, figure in plots.items():
        pictures.save(figure, PLOTS / f"{name}.png", config.plot.dpi)
    print(f"{len(plots)} plots in {PLOTS}")


def read(table: Path) -> NDArray[np.void]:
    """Read a table of numbers; its columns are the fields.

    Raises:
        UserError: it is none.
    """
    try:
        return np.atleast_1d(np.genfromtxt(table, delimiter=",", names=True))
    except ValueError:
        raise UserError(f"{table} {lock.DAMAGED}") from None


def curves(name: str, ours: NDArray[np.void], published: list[dict[str, float]]) -> Figure:
    """Draw one figure of the history over the epochs, ours and the tutorial's."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in published]
    if published:
        values = [row[name] for row in published]
        axes.plot(epochs, values, "o-", color=pictures.PUBLISHED, markersize=3, linewidth=1, label="published")
    axes.plot(ours["epoch"], ours[name], "o-", color=pictures.OURS, markersize=4, linewidth=2, label="ours")
    held_out = name.replace("test", "val")
    if held_out != name and held_out in (ours.dtype.names or ()):
        colour = pictures.VERMILLION
        axes.plot(ours["epoch"], ours[held_out], "o:", color=colour, markersize=4, label="ours, validation")
    pictures.over_epochs(axes, name, int(max([*ours["epoch"], *epochs])))
    axes.set_title(axes.get_title() + (", ours and the tutorial's" if published else ""))
    axes.legend(frameon=False)
    return figure


def confusion_matrix(actual: NDArray[np.int_], predicted: NDArray[np.int_]) -> Figure:
    """Count the test digits by what they are and what they were taken for; the colour shows mistakes only.

    Args:
        actual: (N,), 0 to CLASSES - 1.
        predicted: likewise.
    """
    classes = data.CLASSES
    counts = np.bincount(actual * classes + predicted, minlength=classes**2).reshape(classes, classes)
    mistakes = counts * ~np.eye(classes, dtype=bool)
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mistakes, cmap="Reds", vmax=max(1, 1.5 * mistakes.max()))
    for row, column in np.ndindex(classes, classes):
        if counts[row, column]:
            weight = "bold" if row == column else "normal"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=11, weight=weight)
    axes.set(
        title="confusion matrix", xlabel="predicted", ylabel="actual", xticks=range(classes), yticks=range(classes)
    )
    axes.grid(visible=False)
    return figure


def wrong_digits(images: NDArray[np.uint8], predictions: NDArray[np.void], count: int) -> Figure:
    """Show the test digits that the net got wrong with the highest probability, worst first.

    Args:
        images: (N, *SHAPE).
        predictions: (N,), with the fields actual, predicted and probability.
        count: how many to show, at most.
    """
    wrong = np.flatnonzero(predictions["actual"] != predictions["predicted"])
    worst = wrong[np.argsort(-predictions["probability"][wrong], kind="stable")][:count]
    columns = min(count, 5 if count <= 25 else 10)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.3 * columns, 1.65 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle("most confidently wrong")
    for axes in grid.flat:
        axes.axis("off")
    for axes, index in zip(grid.flat, worst, strict=False):
        axes.imshow(images[index], cmap="gray_r")
        actual, predicted, probability = predictions[index].item()
        sure = f"{100 * probability:.2f} %" if probability < 0.99995 else "> 99.99 %"  # no net is sure
        axes.set_title(f"{actual:.0f} taken for {predicted:.0f}\n{sure}", fontsize=9)
    return figure


if __name__ == "__main__":
    run_command(main)
