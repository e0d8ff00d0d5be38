"""The model to use: the version of ``mnist-mlp`` in MLflow's registry that bears the alias ``champion``."""

from collections.abc import Callable

import mlflow.pytorch
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from stages import StageError, tracking

Classifier = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def load() -> Classifier:
    """Load the champion.

    Returns:
        A function from raw images (N, 28, 28), 0 for paper to 255 for ink, to probabilities (N, 10); any N from 1.

    Raises:
        StageError: no MLflow store is to be had, or no champion in it, or its files are lost, damaged or unsafe.
    """
    tracking.connect()
    uri = f"models:/{tracking.REGISTERED}@{tracking.CHAMPION}"
    try:
        model = mlflow.pytorch.load_model(uri)
    except (MlflowException, OSError, RuntimeError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise StageError(f"MLflow has no usable {uri} ({reason}); `make repro` trains and registers one") from None

    def classify(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            probabilities: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return probabilities

    return classify
