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
from matplotlib.ticker import MaxNLocator
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
BANDS = [(0.9, 0.2), (0.5, 0.5)]  # the share of the runs that a band holds, and how much of the colour it has


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

    pictures.save(curves(runs, history, published), plan.PLOTS / "curves.png", config.plot.dpi)
    pictures.save(dots(runs, published, target), plan.PLOTS / "accuracy.png", config.plot.dpi)

    name, outcome = study_record.track(config)
    print(f"{plan.SUMMARY} and two plots; MLflow: {name} {outcome}")


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


def curves(runs: pd.DataFrame, history: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Draw the tutorial's four plots: for each setting the median and bands that hold runs, and the tutorial's curve.

    With more than two settings there is only the band of half of the runs.
    """
    settings = list(runs[SETTING].unique())
    bands = BANDS if len(settings) <= 2 else BANDS[1:]
    figure = Figure(figsize=(8.36, 6.4 + 0.25 * len(settings)), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, FIGURES, strict=True):
        groups = [history[history[SETTING] == setting].groupby("epoch")[name] for setting in settings]
        colours = _colours(len(settings))
        for share, strength in bands:
            for colour, epochs in zip(colours, groups, strict=True):
                low, high = (epochs.quantile(0.5 + sign * share / 2) for sign in (-1, 1))
                paler = 1 - strength * (1 - np.array(mpl.colors.to_rgb(colour)))  # opaque, so that the legend is true
                label = f"{100 * share:.0f} % of the runs" if settings == [ONLY] else None
                axes.fill_between(low.index, low, high, color=paler, linewidth=0, label=label)
        for colour, epochs, setting in zip(colours, groups, settings, strict=True):
            median = epochs.median()
            marker = "o" if len(median) == 1 else None  # one point has no line
            label = "median" if setting == ONLY else setting
            axes.plot(median.index, median, color=colour, linewidth=2, marker=marker, label=label)
        if not published.empty:
            colour = pictures.PUBLISHED
            axes.plot("epoch", name, "o-", data=published, color=colour, markersize=3, linewidth=1, label="published")
        pictures.over_epochs(axes, name, int(max([0, *history["epoch"], *published["epoch"]])))
    title = _title("curves", runs, published)
    if settings != [ONLY]:
        title += f"; bands: {' and '.join(f'{100 * share:.0f} %' for share, _ in bands)} of the runs"
    figure.suptitle(title)
    legend = axes.get_legend_handles_labels()
    figure.legend(*legend, frameon=False, fontsize=11, loc="outside lower center", ncols=4 if settings == [ONLY] else 1)
    return figure


def _title(what: str, runs: pd.DataFrame, published: pd.DataFrame) -> str:
    theirs = "" if published.empty else ", and the tutorial's"
    return f"{what} of {runs['seed'].nunique()} seeds{theirs}"


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

    figure = Figure(figsize=(8.36, 2 + 1.2 * len(settings)), layout="constrained")
    axes = figure.subplots()
    for row, (colour, setting) in enumerate(zip(_colours(len(settings)), settings, strict=True)):
        _row(axes, accuracies[runs[SETTING] == setting].sort_values(), row, low, width, colour)
    for mark in theirs:
        axes.axvline(mark, color=pictures.PUBLISHED, linewidth=1, label="published")
    axes.axvline(target, color=pictures.TARGET, linewidth=1, linestyle="--", label="target")
    figure.suptitle(_title("test accuracy", runs, published))
    axes.set_xlabel("mean over batches after the last epoch", fontsize=11)
    axes.set(yticks=range(len(settings)), ylim=(len(settings) - 0.4, -0.6))
    lines = [re.sub(r", (?=[a-z]+\.)", "\n", setting) for setting in settings]  # one for each varied parameter
    if lines == [ONLY]:
        diverged = len(runs) - len(accuracies)
        lines = [f"{len(runs)} runs" + (f",\n{diverged} diverged" if diverged else "")]
    axes.set_yticklabels(lines, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    pictures.percent(axes.xaxis)
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
    labels = [f"{100 * value:.1f} %" for value in below]
    if len(labels) > len(BESIDE):
        labels = [f"{len(below)} runs, {labels[0]} to {labels[-1]}"]
    for label, height in zip(labels, row + np.array(BESIDE), strict=False):
        axes.plot(low, height, "<", color=colour, markersize=5)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(label, (low, height), (7, 0), textcoords="offset points", va="center", fontsize=9, bbox=paper)


def _colours(count: int) -> list[Any]:
    many = count > len(pictures.OF_SETTINGS)
    return list(mpl.colormaps["viridis"](np.linspace(0, 0.9, count)) if many else pictures.OF_SETTINGS[:count])


if __name__ == "__main__":
    run_command(main)
