"""Train the net by the tutorial's recipe: plain SGD on cross-entropy, tested after every epoch."""

from pathlib import Path

import torch
from tqdm import tqdm

from mnist_mlp import HISTORY, MODEL, net, params, run_command, store, tracking, training, write


def main() -> None:
    """Train, write the weights and the history, and track both in MLflow."""
    config = params.load()
    train_set, test_set = training.load("train", config), training.load("t10k", config)
    if Path.cwd() != store.ROOT:  # one of several that DVC trains at once, each in a copy of the repository
        torch.set_num_threads(1)

    torch.manual_seed(config.train.seed)
    model = net.mlp(config.model.hidden).to(config.train.device)

    lines = [",".join(["epoch", *training.Epoch._fields])]
    with tracking.new_run(config, threads=str(torch.get_num_threads())) as run:
        epochs = training.train(model, train_set, test_set, config)
        for epoch, figures in enumerate(
            tqdm(epochs, "train", config.train.epochs, unit="epoch", disable=None, leave=False)
        ):
            tqdm.write(
                f"epoch {epoch:2d}  train loss {figures.train_loss:.6f}  train acc {figures.train_acc:.6f}  "
                f"test loss {figures.test_loss:.6f}  test acc {figures.test_acc:.6f}"
            )
            lines.append(",".join([str(epoch), *(f"{value:.6f}" for value in figures)]))
            run.log_epoch(epoch, {name: round(value, 6) for name, value in figures._asdict().items()})

        weights = net.save_weights(model)
        write(HISTORY, "\n".join(lines) + "\n")
        write(MODEL, weights)
        run.log_model(config, weights)


if __name__ == "__main__":
    run_command(main)
