"""What the plots show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist_mlp import data
from stages import plot
from tests import project


def test_each_plot_is_drawn_from_our_history_and_the_published_one(finished: Path, tmp_path: Path) -> None:
    folder = project.copy(finished, tmp_path / "repository", store=False)
    before = (folder / "results/plots/test_acc.png").read_bytes()
    for name in ("data/published_history.csv", "results/history.csv"):
        good = (folder / name).read_text()
        *rows, last = good.splitlines()
        (folder / name).write_text("\n".join([*rows, f"{last.rpartition(',')[0]},0.5"]) + "\n")
        project.run(folder, sys.executable, "-m", "stages.plot")
        assert (folder / "results/plots/test_acc.png").read_bytes() != before
        (folder / name).write_text(good)


def test_the_published_curve_is_the_published_history() -> None:
    dtype = [("epoch", float), ("test_acc", float)]
    ours, published = np.array([(0, 0.9), (1, 0.95)], dtype), np.array([(0, 0.8), (1, 0.85)], dtype)
    (axes,) = plot.curves("test_acc", ours, published).axes
    drawn = {line.get_label(): list(np.asarray(line.get_ydata())) for line in axes.lines}
    assert drawn == {"published": [0.8, 0.85], "ours": [0.9, 0.95]}
    assert axes.get_title() == "test acc"


def test_a_row_of_the_confusion_matrix_is_what_a_digit_is() -> None:
    actual, predicted = np.array([3, 3, 3, 5]), np.array([3, 8, 8, 5])
    (axes,) = plot.confusion_matrix(actual, predicted).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")
    counts = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}  # column, row
    assert counts == {(3, 3): "1", (8, 3): "2", (5, 5): "1"}


def test_metrics_count_rows_by_what_a_digit_is(finished: Path) -> None:
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (predictions["actual"].astype(int), predictions["predicted"].astype(int)), 1)
    assert json.loads((finished / "results/metrics.json").read_text())["confusion"] == counts.tolist()
    assert not np.array_equal(counts, counts.T)


@pytest.mark.parametrize("count", [3, 25])
def test_wrong_digits_are_shown_the_most_confident_first(finished: Path, mnist: Path, count: int) -> None:
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    expected = sorted(wrong["probability"], reverse=True)[:count]
    figure = plot.wrong_digits(data.load("t10k", mnist)[0], predictions, count)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert [title.splitlines()[1] for title in titles] == [f"{probability:.2%}" for probability in expected]
