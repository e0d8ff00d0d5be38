"""Make MLflow's record of the present results complete: one run, the model's version, and the champion.

The pipeline ends with it. ``make track`` runs it by itself: after ``rm mlflow.db``, in a new clone, or on a new server
it fills in from ``results/`` whatever is missing. Where nothing is missing it changes nothing.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

from lineage import git, lock, run_command, runs, write
from mnist_mlp import params, record
from mnist_mlp.recipe import HISTORY, METRICS, MODEL, PLOTS, data

TRACKED = Path("results/tracked")  # for DVC: which results this repository's MLflow store has
# To MLflow. The mean of batches is not among them: it is the last point of test_acc already.
LOGGED = ("accuracy", "validation_accuracy")


def main() -> None:
    """Complete the run, register the model, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m stages.track", description="Make MLflow's record complete.")
    parser.add_argument("--news", action="store_true", help="say nothing where nothing is missing")
    news = parser.parse_args().news
    config = params.load()
    recorded = lock.recorded(config.flat())  # or this ends here: the results are of another state
    metrics = json.loads(METRICS.read_text())
    per_digit = {"digit": range(data.CLASSES), "precision": metrics["precision"], "recall": metrics["recall"]}
    results = runs.Results(
        history=HISTORY,
        model=MODEL,
        log_model=partial(record.log_model, config),
        metrics={name: metrics[name] for name in LOGGED if name in metrics},
        files={"": [METRICS], "plots": sorted(PLOTS.glob("*.png"))},
        note=record.summary(config, metrics),
        tables={"per_digit.json": per_digit},
    )
    run, added = runs.track(record.training(config), recorded, results)
    record.publish(record.EXPERIMENT)
    decision = record.decide(run, config)
    write(TRACKED, run.data.tags[runs.DIGEST] + "\n")
    if news and not added:
        return
    print(f"MLflow: run {run.info.run_name} {'is now' if added else 'was'} complete")
    print(f"{decision}\n{record.lead()}")
    if "DVC_EXP_NAME" in os.environ and not git.keeps_experiments():
        print("DVC keeps no experiment in a shallow clone, so only MLflow has it;\ntype `git fetch --unshallow`")


if __name__ == "__main__":
    run_command(main)
