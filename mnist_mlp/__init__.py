"""The recipe, the study, and the commands that use what the stages make: verify, predict, serve, the verdict."""

import lineage
from mnist_mlp import recipe  # noqa: F401, sets what must be set before PyTorch is loaded

lineage.require("torch", "mlflow", "dvc")
