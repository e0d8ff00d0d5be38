"""Evaluate the saved model on the test set."""

import json

import torch

from lineage import run_command, write
from mnist_mlp import params
from mnist_mlp.recipe import METRICS, MODEL, PREDICTIONS, data, net, training


def main() -> None:
    """Score the test images, and write metrics and predictions."""
    config = params.load()
    model = net.mlp(config.model.hidden)
    net.load_weights(model, MODEL.read_bytes(), str(MODEL))
    sets = training.load(config)
    labels = sets.test.labels

    scores, metrics = training.evaluate(model.to(labels.device), sets, config)
    predicted, probabilities = scores.argmax(1), scores.double().softmax(1).amax(1)
    pairs = torch.bincount(labels * data.CLASSES + predicted, minlength=data.CLASSES**2)
    confusion = pairs.reshape(data.CLASSES, data.CLASSES)  # row: actual, column: predicted
    right = confusion.diagonal()
    # Lists, which DVC leaves out of its tables. A digit that is never predicted has precision 0.
    per_digit = {
        "precision": (right / confusion.sum(0).clamp(min=1)).tolist(),
        "recall": (right / confusion.sum(1)).tolist(),
    }
    rounded = {name: round(value, 6) for name, value in metrics.items()}
    rounded_per_digit = {name: [round(value, 6) for value in values] for name, values in per_digit.items()}
    write(METRICS, json.dumps(rounded | rounded_per_digit | {"confusion": confusion.tolist()}, indent=2) + "\n")
    rows = zip(labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True)
    write(PREDICTIONS, "actual,predicted,probability\n" + "".join(f"{a},{b},{c:.6f}\n" for a, b, c in rows))

    reached = "reached" if metrics["accuracy"] >= config.evaluate.target_accuracy else "missed"
    print(f"test accuracy {metrics['accuracy']:.2%}: target {config.evaluate.target_accuracy:.2%} {reached}")
    print(f"mean of batches {metrics['batch_mean_accuracy']:.4%}; loss {metrics['loss']:.6f}")


if __name__ == "__main__":
    run_command(main)
