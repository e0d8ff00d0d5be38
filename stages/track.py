"""Make MLflow's record of the present results complete: one run, the model's version, and the champion.

The pipeline ends with it. ``make track`` runs it by itself: after ``rm mlflow.db``, in a new clone, or on a new server
it fills in from ``results/`` whatever is missing. Where nothing is missing it changes nothing.
"""

import argparse
import os
from pathlib import Path

from lineage import git, run_command, write
from mnist_mlp import pages, params, registry, store, tracking

TRACKED = Path("results/tracked")  # for DVC: which results this repository's MLflow store has


def main() -> None:
    """Complete the run, register the model, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m stages.track", description="Make MLflow's record complete.")
    parser.add_argument("--news", action="store_true", help="say nothing where nothing is missing")
    news = parser.parse_args().news
    config = params.load()
    run, added = tracking.track(config)
    decision = registry.register(run, config)
    write(TRACKED, run.data.tags["dvc.lock.md5"] + "\n")
    if news and not added:
        return
    print(f"MLflow: run {run.info.run_name} {'is now' if added else 'was'} complete")
    print(f"{decision}\n{pages.lead(store.EXPERIMENT)}")
    if "DVC_EXP_NAME" in os.environ and not git.keeps_experiments():
        print("DVC keeps no experiment in a shallow clone, so only MLflow has it;\ntype `git fetch --unshallow`")


if __name__ == "__main__":
    run_command(main)
