"""Describe the study's runs: where the tutorial's figures lie among them, and how settings differ. Track all in MLflow.

Figures leave out the runs that diverged, unless they say otherwise.
"""

import json
import math
import re
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats

from lineage import run_command, write
from mnist_mlp import params, pictures
from mnist_mlp.published import published_history
from mnist_mlp.recipe.history import FIGURES
from mnist_mlp.study import plan
from mnist_mlp.study import record as study_record

SETTING = "setting"  # a column that joins the varied parameters
ONLY = "the recipe"  # its value where nothing varies
ENOUGH = 6  # runs, for an interval of their mean
ACCURACIES = ["accuracy", "validation_accuracy"]
BESIDE = (-0.25, 0.25, -0.45, 0.45)  # where arrows stand beside a row of dots, in rows
BANDS = {0.9: 0.2, 0.5: 0.4}  # the share of the runs that a band holds, and its opacity


@pictures.styled
def main() -> None:
    """Write summary and plots, and track all."""
    config = params.load()
    runs = read(plan.RUNS)
    history = read(plan.HISTORY).merge(runs.loc[runs["accuracy"].notna(), [SETTING, "seed"]])
    published = pd.DataFrame(published_history(), columns=["epoch", *FIGURES])
    target = config.evaluate.target_accuracy
    settings = list(runs[SETTING].unique())

    summary: dict[str, Any] = {"settings": [describe(runs, history, published, name, target) for name in settings]}
    if len(settings) > 1:
        summary["comparison"] = compare(runs)
    write(plan.SUMMARY, json.dumps(summary, indent=2) + "\n")

    for name in FIGURES:
        pictures.save(curves(history, published, name, settings), plan.PLOTS / f"{name}.png", config.plot.dpi)
    pictures.save(dots(runs, published, target), plan.PLOTS / "accuracy.png", config.plot.dpi)

    name, outcome = study_record.track(config)
    print(f"{plan.SUMMARY} and {len(FIGURES) + 1} plots; MLflow: {name} {outcome}")


def read(path: Any) -> pd.DataFrame:
    """Read a table of the study, and add the column ``SETTING``."""
    names = pd.read_csv(path, nrows=0).columns
    varied = [name for name in names if "." in name]
    numbers = {"seed": int, "epoch": int} | dict.fromkeys(FIGURES, float)  # also in a table without rows
    table = pd.read_csv(path, dtype=numbers | dict.fromkeys(varied, str))
    columns = (name + " " + table[name] for name in varied)
    table[SETTING] = pd.Series(map(", ".join, zip(*columns, strict=True))) if varied else ONLY
    return table


def describe(
    runs: pd.DataFrame, history: pd.DataFrame, published: pd.DataFrame, setting: str, target: float
) -> dict[str, Any]:
    """Describe the runs of one setting.

    Args:
        runs: runs.csv.
        history: history.csv, without the runs that diverged.
        published: the tutorial's history.
        setting: which runs.
        target: the accuracy to reach. A run that diverged has missed it.

    Returns:
        What summary.json holds of a setting. Intervals are of 95 % confidence: of a mean as ``_interval`` gives it, of
        a share by Wilson's formula. A percentile is the share of the runs below the published figure, in percent.
    """
    of_setting = runs[runs[SETTING] == setting]
    reached = int((of_setting["accuracy"] >= target).sum())
    share = stats.binomtest(reached, len(of_setting)).proportion_ci(method="wilson")
    return {
        SETTING: setting,
        "runs": len(of_setting),
        "diverged": int(of_setting["accuracy"].isna().sum()),
        **{name: distribution(of_setting[name].dropna()) for name in runs.columns.intersection(ACCURACIES)},
        "target": {
            "accuracy": target,
            "reached": reached,
            "share": reached / len(of_setting),
            "interval": [share.low, share.high],
        },
        "last_epoch": last_epoch(history[history[SETTING] == setting], published),
    }


def last_epoch(history: pd.DataFrame, published: pd.DataFrame) -> dict[str, Any]:
    """Say where the tutorial's last figures lie among those of the runs."""
    last = history.groupby("seed").last()
    theirs = dict.fromkeys(FIGURES, math.nan) if published.empty else published.iloc[-1]
    return {
        name: {
            "published": _number(theirs[name]),
            "median": _number(last[name].median()),
            "band_90": [_number(last[name].quantile(share)) for share in (0.05, 0.95)],
            "percentile": _number(stats.percentileofscore(last[name], theirs[name], kind="strict")),
        }
        for name in FIGURES
    }


def distribution(values: pd.Series) -> dict[str, Any]:
    """Describe a sample: the deviation is that of the sample (n - 1), the interval that of the mean."""
    found = {name: getattr(values, name)() for name in ("mean", "std", "median", "min", "max")}
    return {name: _number(value) for name, value in found.items()} | _interval(values)


def compare(runs: pd.DataFrame) -> dict[str, Any]:
    """Compare each setting with the first: the difference of two runs of one seed, over all seeds.

    The validation accuracy decides. Without one there is only the test set; to choose by it is to train on it.
    """
    has_validation = (
        "validation_accuracy" in runs and not runs.loc[runs["accuracy"].notna(), "validation_accuracy"].hasnans
    )
    metric = "validation_accuracy" if has_validation else "accuracy"
    by_seed = runs.pivot(index="seed", columns=SETTING, values=metric)
    first, *others = runs[SETTING].unique()
    differences = {name: (by_seed[name] - by_seed[first]).dropna() for name in others}
    return {
        "metric": metric,
        "chooses_by_test_set": not has_validation,
        "first": first,
        "differences": [
            {SETTING: name, "pairs": len(values), "mean": _number(values.mean())} | _interval(values)
            for name, values in differences.items()
        ],
    }


def _interval(values: pd.Series) -> dict[str, list[float | None]]:
    """Give the 95 % confidence interval of the mean; fewer than ``ENOUGH`` values say more than an interval of theirs.

    The interval is that of the bootstrap, bias-corrected and accelerated (Efron, Better bootstrap confidence intervals,
    1987). It lies between the least and the largest value, so that of an accuracy stays in [0, 1]; and one run that is
    far off makes it longer on that side only.
    """
    if len(values) < ENOUGH:
        return {"values": [_number(value) for value in values]}
    if values.nunique() == 1:
        return {"interval": [_number(values.iloc[0])] * 2}
    found = stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return {"interval": [_number(bound) for bound in found]}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def curves(history: pd.DataFrame, published: pd.DataFrame, name: str, settings: list[str]) -> Figure:
    """Draw one figure over the epochs: for each setting the median and two bands, and the tutorial's curve on top."""
    many = len(settings) > 1
    figure = Figure(figsize=(6, 4 + 0.25 * len(settings) * many), layout="constrained")
    axes = figure.subplots()
    for colour, setting in zip(_colours(len(settings)), settings, strict=True):
        epochs = history[history[SETTING] == setting].groupby("epoch")[name]
        for share, opacity in BANDS.items():
            low, high = (epochs.quantile(0.5 + sign * share / 2) for sign in (-1, 1))
            label = None if many else f"{share:.0%} of the runs"
            axes.fill_between(low.index, low, high, color=colour, alpha=opacity, linewidth=0, label=label)
        median = epochs.median()
        axes.plot(median.index, median, color=colour, linewidth=2, label="median" if setting == ONLY else setting)
    if not published.empty:
        axes.plot("epoch", name, "o-", data=published, color="black", markersize=3, linewidth=1, label="published")
    axes.set(title=name.replace("_", " "), xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name.endswith("acc"):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if many:
        figure.legend(frameon=False, fontsize=10, loc="outside lower center")
    else:
        axes.legend(frameon=False, fontsize=10)
    return figure


def dots(runs: pd.DataFrame, published: pd.DataFrame, target: float) -> Figure:
    """Draw the last accuracies, as the tutorial counts: one dot a run, one row a setting. Equal ones are stacked.

    The axis shows the bulk of the runs. A run far below it is an arrow at the edge, with its accuracy. More than four
    of a setting share an arrow.
    """
    settings = runs[SETTING].unique()
    theirs = published["test_acc"].iloc[-1:]
    marks = [*theirs, target]
    accuracies = runs["batch_mean_accuracy"].dropna()
    quartiles = accuracies.quantile([0.25, 0.75]) if len(accuracies) else pd.Series(marks)
    fence = quartiles.iloc[0] - 4 * np.ptp(quartiles)
    low, high = (limit([*accuracies[accuracies >= fence], *marks]) for limit in (min, max))
    low -= 0.06 * (high - low or 0.01)
    width = (high - low) / 60

    figure = Figure(figsize=(6, 1.6 + 1.2 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for row, (colour, setting) in enumerate(zip(_colours(len(settings)), settings, strict=True)):
        _row(axes, accuracies[runs[SETTING] == setting].sort_values(), row, low, width, colour)
    for mark in theirs:
        axes.axvline(mark, color="black", linewidth=1, label="published")
    axes.axvline(target, color="tab:red", linewidth=1, linestyle="--", label="target")
    figure.suptitle("test accuracy after the last epoch")
    axes.set(yticks=range(len(settings)), ylim=(len(settings) - 0.4, -0.6))
    lines = [re.sub(r", (?=[a-z]+\.)", "\n", setting) for setting in settings]  # one for each varied parameter
    axes.set_yticklabels([f"{len(runs)} runs"] if lines == [ONLY] else lines, fontsize=10)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.grid(visible=False, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=10, loc="outside lower center", ncols=2)
    return figure


def _row(axes: Axes, accuracies: pd.Series, row: int, low: float, width: float, colour: Any) -> None:
    """Draw the dots of a setting, in columns of a width, and arrows for the runs below the axis."""
    columns, counts = np.unique(np.round(accuracies[accuracies >= low] / width), return_counts=True)
    for column, count in zip(columns, counts, strict=True):
        heights = row + (np.arange(count) - (count - 1) / 2) * 0.8 / max(8, counts.max())
        axes.plot(np.full(count, column * width), heights, "o", color=colour, markersize=4)
    below = accuracies[accuracies < low]
    labels = [f"{value:.1%}" for value in below]
    if len(labels) > len(BESIDE):
        labels = [f"{len(below)} runs, {labels[0]} to {labels[-1]}"]
    for label, height in zip(labels, row + np.array(BESIDE), strict=False):
        axes.plot(low, height, "<", color=colour, markersize=5)
        axes.annotate(label, (low, height), (6, 0), textcoords="offset points", va="center", fontsize=9)


def _colours(count: int) -> list[Any]:
    return [mpl.colormaps["tab10" if count <= 10 else "viridis"](i if count <= 10 else i / count) for i in range(count)]


if __name__ == "__main__":
    run_command(main)
