"""The champion: the version of ``mnist-mlp`` in MLflow's registry that ``predict`` and ``serve`` answer by."""

import json
from collections.abc import Callable

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from numpy.typing import NDArray

import lineage
from lineage import UserError, registry
from mnist_mlp import params, record
from mnist_mlp.recipe import METRICS, data

Classifier = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
OTHER_DATA = f"other data than {data.NAME} as mnist_mlp/recipe/data.py describes it"


def load() -> tuple[ModelVersion, Classifier]:
    """Load the champion.

    Returns:
        Its version, and a function from raw images (N, *SHAPE), uint8, 0 for paper to 255 for ink, to probabilities
        (N, CLASSES), float32; any N from 1.

    Raises:
        UserError: no MLflow store is available, or no champion in it, or it cannot be loaded.
    """
    import torch

    version, model = registry.load_champion(record.NAME, data.DIGEST, OTHER_DATA, mlflow.pytorch.load_model, advice)

    def classify(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            probabilities: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return probabilities

    return version, classify


def advice() -> str:
    """Say what to do if there is no champion."""
    try:
        config, accuracy = params.load(), json.loads((lineage.HERE / METRICS).read_text())["accuracy"]
    except (UserError, OSError, ValueError, KeyError):
        return "run `make repro`"
    if not config.evaluate.register_model:
        return "params.yaml: evaluate.register is false; set it to true, then run `make repro`"
    if accuracy < (target := config.evaluate.target_accuracy):
        missed = f"the results miss the target, {accuracy:.2%} of {target:.2%}"
        return f"{missed}, so there is no champion; change params.yaml, then run `make repro`"
    return "`make track` makes it from the results"
