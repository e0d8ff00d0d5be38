"""Train the net by the tutorial's recipe: plain SGD on cross-entropy, tested after every epoch."""

from collections.abc import Iterator, Mapping
from functools import partial

import mlflow
from tqdm import tqdm

from lineage import md5, run_command, runs, write
from mnist_mlp import params, record
from mnist_mlp.recipe import HISTORY, MODEL, net, training
from mnist_mlp.recipe.history import csv_text, rounded


def main() -> None:
    """Train, write the weights and the history, and track both in MLflow."""
    config = params.load()
    sets = training.load(config)
    model = training.new_model(config)
    history = []
    with runs.live(record.training(config)) as run:
        epochs = training.train(model, sets, config)
        bar = tqdm(epochs, "train", config.train.epochs, unit="epoch", disable=None, leave=False)
        for epoch, figures in enumerate(bar):
            row = rounded(figures)
            tqdm.write("  ".join([f"epoch {epoch:2d}", *in_words(figures)]))
            history.append({"epoch": str(epoch)} | row)
            run.send(mlflow.log_metrics, {name: float(value) for name, value in row.items()}, step=epoch)

        weights = net.save_weights(model)
        write(HISTORY, csv_text(history[0], history))
        write(MODEL, weights)
        run.send(runs.add_model, run.id, md5(weights), partial(record.log_model, config))


def in_words(figures: Mapping[str, float]) -> Iterator[str]:
    """Give loss and accuracy of each set, so that an epoch is one line of 80 columns."""
    for name in ("train", "val", "test"):
        if f"{name}_loss" in figures:
            yield f"{name} {figures[f'{name}_loss']:.4f} {100 * figures[f'{name}_acc']:5.2f} %"


if __name__ == "__main__":
    run_command(main)
