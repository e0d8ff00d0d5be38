"""Make MLflow's record of the present results complete: one run, the model's version, and the champion.

The pipeline ends with it. ``make track`` runs it by itself: after ``rm mlflow.db``, in a new clone, or on a new server
it fills in from ``results/`` whatever is missing. Where nothing is missing it changes nothing.
"""

import os
from pathlib import Path

from mnist_mlp import lineage, params, registry, run_command, store, tracking, write

TRACKED = Path("results/tracked")  # for DVC: which results this repository's MLflow store has


def main() -> None:
    """Complete the run, register the model, and say what came of it."""
    config = params.load()
    run, added = tracking.track(config)
    print(f"MLflow: run {run.info.run_name} {'is now' if added else 'was'} complete; {registry.register(run, config)}")
    print(f"        {store.page()}")
    if "DVC_EXP_NAME" in os.environ and not lineage.keeps_experiments():
        print("        DVC keeps no experiment in a shallow clone, so only MLflow has it; type `git fetch --unshallow`")
    write(TRACKED, run.data.tags["dvc.lock.md5"] + "\n")


if __name__ == "__main__":
    run_command(main)
