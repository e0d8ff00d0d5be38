"""What decides a byte of the model and of its history, and nothing else: data, net, training and their parameters.

This file is imported before PyTorch: it sets what must be set before that, and names the results' files.
"""

import os
from pathlib import Path

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products, where train.device is cuda

# The paths of what the stages exchange, from the repository's root.
MODEL = Path("results/model.safetensors")
HISTORY = Path("results/history.csv")
METRICS = Path("results/metrics.json")
PREDICTIONS = Path("results/predictions.csv")
PLOTS = Path("results/plots")
