"""Evaluate the saved model on the test set."""

import json

import mlflow
import torch
from torch.nn import functional

from stages import METRICS, MODEL, PREDICTIONS, data, net, params, run, tracking, write


def main() -> None:
    """Score the test images, write metrics and predictions, and add them to the model's MLflow run."""
    p = params.load()
    model = net.mlp(p.model.hidden)
    net.load_weights(model, MODEL.read_bytes(), str(MODEL))
    images, labels = (torch.from_numpy(array) for array in data.load("t10k"))
    labels = labels.long()

    scores = net.score(model, net.normalise(images, p.data.mean, p.data.std), p.evaluate.batch_size)
    probabilities, predicted = scores.softmax(1).max(1)
    confusion = torch.bincount(labels * 10 + predicted, minlength=100).reshape(10, 10)  # row: actual, column: predicted
    hits = confusion.diagonal()
    metrics = {
        "accuracy": hits.sum().item() / len(labels),
        "batch_mean_accuracy": net.batch_means(scores, labels, p.evaluate.batch_size)[1],
        "loss": functional.cross_entropy(scores.double(), labels).item(),
    }
    # Lists, which DVC leaves out of its tables; a digit that is never predicted has precision 0.
    per_class = {
        "precision": (hits / confusion.sum(0).clamp(min=1)).tolist(),
        "recall": (hits / confusion.sum(1)).tolist(),
    }
    rounded = {name: round(value, 6) for name, value in metrics.items()}
    rounded_per_class = {name: [round(value, 6) for value in values] for name, values in per_class.items()}

    verdict = "reached" if metrics["accuracy"] >= p.evaluate.target_accuracy else "missed"
    print(
        f"test accuracy {metrics['accuracy']:.2%} (mean over batches {metrics['batch_mean_accuracy']:.4%}), "
        f"loss {metrics['loss']:.6f}: target {p.evaluate.target_accuracy:.2%} {verdict}"
    )

    with tracking.run_of_model(p) as tracked:
        write(METRICS, json.dumps(rounded | rounded_per_class | {"confusion": confusion.tolist()}, indent=2) + "\n")
        rows = zip(labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True)
        write(PREDICTIONS, "actual,predicted,probability\n" + "".join(f"{a},{b},{c:.6f}\n" for a, b, c in rows))
        by_digit = {
            f"{name}/{digit}": v for name, values in rounded_per_class.items() for digit, v in enumerate(values)
        }
        tracked.log(lambda: mlflow.log_metrics(rounded | by_digit))
        tracked.log(lambda: mlflow.log_artifact(str(METRICS)))
        if p.evaluate.register_model:
            print(tracking.register(tracked, p, metrics["accuracy"]))


if __name__ == "__main__":
    run(main)
