"""What the plots show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist_mlp.recipe import data
from stages import plot
from tests import project


@pytest.mark.recipe
def test_each_plot_is_drawn_from_our_history_and_the_published_one(finished: Path, tmp_path: Path) -> None:
    folder = project.copy(finished, tmp_path / "repository", store=False)
    names = ("train_loss", "train_acc", "test_loss", "test_acc")

    def drawn() -> list[bytes]:
        return [(folder / f"results/plots/{name}.png").read_bytes() for name in names]

    before = drawn()
    for path in ("data/published_history.csv", "results/history.csv"):
        good = (folder / path).read_text()
        *rows, last = good.splitlines()
        (folder / path).write_text("\n".join([*rows, last.partition(",")[0] + 4 * ",0.5"]) + "\n")
        project.run(folder, sys.executable, "-m", "stages.plot")
        assert not set(before) & set(drawn())
        (folder / path).write_text(good)


def test_the_backend_of_a_notebook_and_a_users_style_do_not_change_the_plots(finished: Path, tmp_path: Path) -> None:
    folder = project.copy(finished, tmp_path / "repository", store=False)
    (tmp_path / "matplotlibrc").write_text("font.size: 30\n")
    settings = {"MPLBACKEND": "module://not_installed", "MATPLOTLIBRC": str(tmp_path)}
    project.run(folder, sys.executable, "-m", "stages.plot", env=project.environment(**settings))
    assert project.contents(folder) == project.contents(finished)


def test_a_notebook_that_imports_a_stage_keeps_its_own_backend_and_style(tmp_path: Path) -> None:
    script = """if True:
        import matplotlib, os
        before = matplotlib.rcParams.copy()
        from stages import plot
        print(os.environ["MPLBACKEND"], matplotlib.rcParams == before)"""
    environment = project.environment(MPLBACKEND="svg", PYTHONPATH=str(project.REPOSITORY))
    assert project.run(tmp_path, sys.executable, "-c", script, env=environment).stdout == "svg True\n"


def test_the_published_curve_is_the_published_history() -> None:
    ours = np.array([(0, 0.9), (1, 0.95)], [("epoch", float), ("test_acc", float)])
    published = [{"epoch": 0.0, "test_acc": 0.8}, {"epoch": 1.0, "test_acc": 0.85}]
    (axes,) = plot.curves("test_acc", ours, published).axes
    drawn = {line.get_label(): list(np.asarray(line.get_ydata())) for line in axes.lines}
    assert drawn == {"published": [0.8, 0.85], "ours": [0.9, 0.95]}
    assert [line.get_color() for line in axes.lines] == ["#000000", "#0072b2"]  # black, and Okabe and Ito's blue
    assert axes.get_title() == "test accuracy, ours and the tutorial's"


def test_the_validation_curve_is_that_of_the_images_held_out() -> None:
    ours = np.array([(0, 0.9, 0.8)], [("epoch", float), ("test_acc", float), ("val_acc", float)])
    (axes,) = plot.curves("test_acc", ours, []).axes
    drawn = {line.get_label(): list(np.asarray(line.get_ydata())) for line in axes.lines}
    assert drawn == {"ours": [0.9], "ours, validation": [0.8]}


@pytest.mark.parametrize(
    ("last", "labels"),
    [(0, [0]), (1, [0, 1]), (5, [0, 1, 2, 3, 4, 5]), (19, [0, 5, 10, 15, 19]), (20, [0, 5, 10, 15, 20])],
)
def test_whole_epochs_are_labelled_the_last_one_too(last: int, labels: list[int]) -> None:
    ours = np.array([(epoch, 0.9) for epoch in range(last + 1)], [("epoch", float), ("test_acc", float)])
    (axes,) = plot.curves("test_acc", ours, []).axes
    assert list(axes.get_xticks()) == labels


def test_accuracies_are_in_percent_and_losses_on_a_logarithmic_scale() -> None:
    ours = np.array([(0, 0.9), (1, 0.01)], [("epoch", float), ("test_acc", float)])
    (axes,) = plot.curves("test_acc", ours, []).axes
    assert axes.yaxis.get_major_formatter()(0.95) == "95 %"
    ours.dtype.names = ("epoch", "test_loss")
    (axes,) = plot.curves("test_loss", ours, []).axes
    assert axes.get_yscale() == "log"


def test_a_row_of_the_confusion_matrix_is_what_a_digit_is() -> None:
    actual, predicted = np.array([1, 1, 1, 0]), np.array([1, 2, 2, 0])
    (axes,) = plot.confusion_matrix(actual, predicted).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "actual")
    counts = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}  # column, row
    assert counts == {(1, 1): "1", (2, 1): "2", (0, 0): "1"}
    coloured = np.argwhere(np.asarray(axes.images[0].get_array())).tolist()
    assert coloured == [[1, 2]]  # mistakes only


def test_metrics_count_rows_by_what_a_digit_is(finished: Path) -> None:
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    counts = np.zeros((data.CLASSES, data.CLASSES), int)
    np.add.at(counts, (predictions["actual"].astype(int), predictions["predicted"].astype(int)), 1)
    assert json.loads((finished / "results/metrics.json").read_text())["confusion"] == counts.tolist()
    assert not np.array_equal(counts, counts.T)


@pytest.mark.parametrize("count", [3, 25])
def test_wrong_digits_are_shown_the_most_confident_first(finished: Path, mnist: Path, count: int) -> None:
    predictions = np.genfromtxt(finished / "results/predictions.csv", delimiter=",", names=True)
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    expected = sorted(wrong["probability"], reverse=True)[:count]
    images = data.load("t10k", mnist)[0]
    shown = [axes for axes in plot.wrong_digits(images, predictions, count).axes if axes.get_title()]
    titles = [axes.get_title() for axes in shown]
    assert [title.splitlines()[1] for title in titles] == [as_shown(probability) for probability in expected]
    for axes in shown:
        assert axes.images[0].get_cmap().name == "gray_r"  # ink is dark
        (index,) = np.flatnonzero((images == np.asarray(axes.images[0].get_array())).all((1, 2)))
        actual, predicted, probability = predictions[index].item()
        assert axes.get_title() == f"{actual:.0f} taken for {predicted:.0f}\n{as_shown(probability)}"


def as_shown(probability: float) -> str:
    rounded = f"{100 * probability:.2f} %"
    return "> 99.99 %" if rounded == "100.00 %" else rounded
