"""What decides a byte of the model and of its history, and nothing else: data, net, training and their parameters.

This file is imported before PyTorch. It sets what must be set before PyTorch is loaded, and names the results' files.
"""

import os
from pathlib import Path

import lineage

# PyTorch and oneDNN use the widest instructions that they find, and each width adds in another order. Limited to AVX2,
# they give the same bytes on every x86-64 processor that has it. See also net.py.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
HAS_AVX2 = lineage.CPUINFO.exists() and " avx2 " in lineage.CPUINFO.read_text()
if HAS_AVX2:  # PyTorch does not check this value: on a processor without AVX2 it would crash
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products, where train.device is cuda

# The paths of what the stages exchange, from the repository's root.
MODEL = Path("results/model.safetensors")
HISTORY = Path("results/history.csv")
METRICS = Path("results/metrics.json")
PREDICTIONS = Path("results/predictions.csv")
PLOTS = Path("results/plots")
