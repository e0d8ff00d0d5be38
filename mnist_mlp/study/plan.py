"""The study: the recipe with many seeds, and with other values of some parameters. Its runs, and its tables."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from lineage import UserError, lock
from mnist_mlp.params import Params
from mnist_mlp.recipe.params import VARIABLE

PIPELINE = Path("study/dvc.yaml")
LOCK = Path("study/dvc.lock")
RUNS = Path("results/study/runs.csv")
HISTORY = Path("results/study/history.csv")
SUMMARY = Path("results/study/summary.json")
PLOTS = Path("results/study/plots")

METRICS = ("accuracy", "batch_mean_accuracy", "loss")  # and validation_accuracy, where images are held out
Row = dict[str, str]  # of a table, by column


class Outcome(NamedTuple):
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
    stages = lock.read_stages(LOCK.read_bytes()) if LOCK.exists() else {}
    if "replicate" not in stages:
        raise UserError(f"{LOCK} has no study yet; run `make study`")
    return {"replicate": stages["replicate"]}


def check_files(stages: dict[str, Any]) -> None:
    """Compare the files that stages have made with those that study/dvc.lock records.

    Raises:
        UserError: one is not there, or another.
    """
    for path, md5 in lock.results(stages).items():
        if lock.path_md5(path) != md5:
            raise UserError(f"{path} is not what the study has made; run `make study`")


def check_parameters(config: Params) -> None:
    """Compare the parameters with those in study/dvc.lock.

    Raises:
        UserError: the study was made with others, or there is none.
    """
    made_with = lock.parameters(recorded())
    for key in VARIABLE:
        if (before := made_with.get(key)) != (now := config.flat()[key]):
            raise UserError(f"params.yaml: {key} is {now}, and the study was made with {before}; run `make study`")


def read(runs: str, history: str) -> list[tuple[Row, Outcome]]:
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
        found.append((member, Outcome(_filled(row), md5, epochs.get(tuple(member.values()), []))))
    return found


def _filled(row: Row) -> Row:
    return {name: value for name, value in row.items() if value}
