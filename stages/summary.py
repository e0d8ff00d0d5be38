"""Say in a few lines what the last pipeline run came to. `make repro` ends with it."""

import csv
import json

from stages import METRICS, PLOTS, PUBLISHED, params, run


def main() -> None:
    """Compare with the published figures, and say where to look."""
    metrics = json.loads(METRICS.read_text())
    published = list(csv.DictReader(PUBLISHED.open()))[-1]
    verdict = "reached" if metrics["accuracy"] >= params.load().evaluate.target_accuracy else "missed"
    print(f"""
test accuracy   {metrics["accuracy"]:.2%} of 10,000 images (target {verdict})
mean of batches {metrics["batch_mean_accuracy"]:.4%}, published {float(published["test_acc"]):.4%}
plots           {PLOTS}
every figure    source .venv/bin/activate && mlflow ui, then open
                http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning""")


if __name__ == "__main__":
    run(main)
