"""The proof of the study: train some of its runs again, drawn at random, and compare the model and every figure.

Exit status: 0 for identical, 1 for different, 2 where there is no answer, and why.
"""

import argparse
import random
import sys

from tqdm import tqdm

from lineage import UserError, run_command
from mnist_mlp import params
from mnist_mlp.params import Params
from mnist_mlp.study import cluster, plan


def main() -> None:
    """Check some runs, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m mnist_mlp.study.check", description="Train again, and compare.")
    parser.add_argument("--runs", type=int, default=2, help="how many runs to draw (2)")
    count = parser.parse_args().runs
    try:
        config = params.load()
        drawn = draw(config, count)
        differences = check(config, drawn)
    except (UserError, OSError) as error:
        parser.exit(2, f"study-check: {error}\n")
    if differences:
        print(*differences, sep="\n")
        sys.exit(1)
    print(f"identical: {'; '.join(plan.label(row) for row, _ in drawn)}: every figure and the model's MD5")


def draw(config: Params, count: int) -> list[tuple[plan.Row, plan.Outcome]]:
    """Draw runs from the tables.

    Raises:
        UserError: there are not so many runs, or the tables are not those of a study with these parameters.
    """
    plan.check_parameters(config)
    plan.check_files(plan.recorded())
    runs = plan.read(plan.RUNS.read_text(), plan.HISTORY.read_text())
    if not 1 <= count <= len(runs):
        raise UserError(f"--runs is {count}: the study has {len(runs)} runs")
    return random.sample(runs, count)


def check(config: Params, drawn: list[tuple[plan.Row, plan.Outcome]]) -> list[str]:
    """Train the runs again; give a line for each that comes out different, on its first difference."""
    print(f"training again: {'; '.join(plan.label(row) for row, _ in drawn)}", flush=True)
    differences = {}
    runs = cluster.run_all([plan.config_of(row, config) for row, _ in drawn])
    for index, again in tqdm(runs, "study-check", len(drawn), unit="run", disable=None, leave=False):
        row, run = drawn[index]
        if again != run:
            differences[index] = f"different: {plan.label(row)}: {first_difference(run, again)}"
    return [differences[index] for index in sorted(differences)]


def first_difference(expected: plan.Outcome, actual: plan.Outcome) -> str:
    """Name the first figure that differs; the epochs come before what the trained model gives."""
    theirs, ours = _figures(expected), _figures(actual)
    key = next(key for key in theirs | ours if theirs.get(key) != ours.get(key))
    return f"{key} is {theirs.get(key, 'missing')} in the table, {ours.get(key, 'missing')} here"


def _figures(run: plan.Outcome) -> plan.Row:
    epochs = {
        f"epoch {epoch}: {figure}": value for epoch, row in enumerate(run.history) for figure, value in row.items()
    }
    return epochs | run.metrics | {"the model's MD5": run.model_md5 or "none"}


if __name__ == "__main__":
    run_command(main)
