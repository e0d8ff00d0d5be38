"""The recipe, the study, and the commands that use what the stages make: verify, predict, serve, the verdict."""

import os

import lineage
from mnist_mlp import recipe  # noqa: F401, sets what must be set before PyTorch is loaded

lineage.require("torch", "mlflow", "dvc")

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A model's .pt2 file contains its weights as a pickle. With this setting MLflow opens the file only if that pickle
# holds nothing but tensors.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
