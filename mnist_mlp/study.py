"""The study: the recipe with many seeds, and with other values of some parameters. Its runs, and its tables."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from mnist_mlp import FIGURES, UserError, csv_text, lineage
from mnist_mlp.params import VARIABLE, Params

PIPELINE = Path("study/dvc.yaml")
LOCK = Path("study/dvc.lock")
RUNS = Path("results/study/runs.csv")
HISTORY = Path("results/study/history.csv")
SUMMARY = Path("results/study/summary.json")
PLOTS = Path("results/study/plots")

METRICS = ("accuracy", "batch_mean_accuracy", "loss")  # and validation_accuracy, where images are held out
Row = dict[str, str]  # of a table, by column


class Run(NamedTuple):
    """What one training gives, as the tables have it: six decimals. If it diverged, it has no metrics and no model."""

    metrics: Row
    model_md5: str
    history: list[Row]  # from epoch 0; without the epoch


def configs(config: Params) -> list[Params]:
    """List the parameters of every run: setting after setting, each with the seeds 1 to ``study.seeds``."""
    return [
        config.replaced(setting | {"train.seed": seed})
        for setting in config.settings()
        for seed in range(1, config.study.seeds + 1)
    ]


def identity(config: Params) -> Row:
    """Give the columns that tell a run from the others of its study: the varied parameters and the seed."""
    return {name: str(config.flat()[name]) for name in config.study.vary} | {"seed": str(config.train.seed)}


def label(identity: Row) -> str:
    """Name a run, such as ``train.lr 0.05, seed 1``."""
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def varied(row: Row) -> Row:
    """Keep the columns that name a parameter: what tells one setting from another."""
    return {name: value for name, value in row.items() if "." in name}


def config_of(row: Row, config: Params) -> Params:
    """Give the parameters of a row's run: those of ``config``, but for the row's varied parameters and its seed."""
    values = {name: YAML(typ="safe").load(text) for name, text in varied(row).items()}
    return config.replaced(values | {"train.seed": int(row["seed"])})


def recorded() -> dict[str, Any]:
    """Read the stage that has made the tables from study/dvc.lock, by its name.

    Raises:
        UserError: there is no study.
    """
    if not LOCK.exists():
        raise UserError(f"there is no {LOCK}, so there is no study yet; run `make study`")
    return {"replicate": lineage.read_stages(LOCK.read_bytes())["replicate"]}


def check_parameters(config: Params) -> None:
    """Compare the parameters with those in study/dvc.lock.

    Raises:
        UserError: the study was made with others, or there is none.
    """
    made_with = lineage.parameters(recorded())
    for key in VARIABLE:
        if (before := made_with.get(key)) != (now := config.flat()[key]):
            raise UserError(f"params.yaml: {key} is {now}, and the study was made with {before}; run `make study`")


def tables(config: Params, runs: Sequence[Run]) -> tuple[str, str]:
    """Make runs.csv, one row a run, and history.csv, one row a run and epoch.

    Args:
        config: for the names of the varied parameters.
        runs: in the order of ``configs``, so that the bytes do not depend on which run ended first.
    """
    heads = [identity(member) for member in configs(config)]
    rows = [head | run.metrics | {"model_md5": run.model_md5} for head, run in zip(heads, runs, strict=True)]
    history = [
        head | {"epoch": str(epoch)} | figures
        for head, run in zip(heads, runs, strict=True)
        for epoch, figures in enumerate(run.history)
    ]
    metrics = dict.fromkeys([*METRICS, *(name for run in runs for name in run.metrics)])
    figures = dict.fromkeys([*FIGURES, *(name for run in runs for row in run.history for name in row)])
    return csv_text([*heads[0], *metrics, "model_md5"], rows), csv_text([*heads[0], "epoch", *figures], history)


def read(runs: str, history: str) -> list[tuple[Row, Run]]:
    """Read the two tables: for each run its varied parameters and seed, and what it gave."""
    epochs: dict[tuple[str, ...], list[Row]] = {}
    for row in csv.DictReader(history.splitlines()):
        member = {name: row.pop(name) for name in [*varied(row), "seed"]}
        del row["epoch"]
        epochs.setdefault(tuple(member.values()), []).append(_filled(row))
    found = []
    for row in csv.DictReader(runs.splitlines()):
        member = {name: row.pop(name) for name in [*varied(row), "seed"]}
        md5 = row.pop("model_md5")
        found.append((member, Run(_filled(row), md5, epochs.get(tuple(member.values()), []))))
    return found


def _filled(row: Row) -> Row:
    return {name: value for name, value in row.items() if value}


def in_words(summary: dict[str, Any]) -> str:
    """Say what the summary holds, in lines for a terminal and a table in Markdown for each setting."""
    lines = []
    if comparison := summary.get("comparison"):
        name = comparison["metric"].replace("_", " ")
        lines += ["", f"{name}, difference from {comparison['first']} in points, paired by seed:"]
        for row in comparison["differences"]:
            lines.append(f"- {row['setting']}: {_points(row['mean'])} ({_spread(row, _points)}, {row['pairs']} pairs)")
        if comparison["chooses_by_test_set"]:
            lines.append(
                "Warning: this is the test set. To choose a setting by it is to train on it; set data.validation."
            )
    for found in summary["settings"]:
        accuracy, target = found["accuracy"], found["target"]
        lines += [
            "",
            f"{found['setting']}: {found['runs']} runs, {found['diverged']} diverged",
            f"test accuracy: mean {_percent(accuracy['mean'])} ({_spread(accuracy, _percent)}), "
            f"standard deviation {_percent(accuracy['std'])}, median {_percent(accuracy['median'])}, "
            f"from {_percent(accuracy['min'])} to {_percent(accuracy['max'])}",
            f"{target['reached']} of {found['runs']} runs reach {_percent(target['accuracy'])} "
            f"(95 % interval of the share {_percents(target['interval'])})",
            "",
            "| after the last epoch | published | median | 90 % of the runs | percentile |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, row in found["last_epoch"].items():
            show = _percent if name.endswith("acc") else "{:.4f}".format
            if row["median"] is not None:
                low, high = row["band_90"]
                theirs = ("", "") if row["published"] is None else (show(row["published"]), f"{row['percentile']:.0f}")
                lines.append(
                    f"| {name.replace('_', ' ')} | {theirs[0]} | {show(row['median'])} "
                    f"| {show(low)} to {show(high)} | {theirs[1]} |"
                )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _points(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:+.2f}"


def _percents(values: list[float | None]) -> str:
    return " to ".join(map(_percent, values))


def _spread(row: dict[str, Any], show: Callable[[float | None], str]) -> str:
    if "values" in row:
        return f"values {', '.join(map(show, row['values'])) or 'none'}"
    return f"95 % interval {' to '.join(map(show, row['interval']))}"
