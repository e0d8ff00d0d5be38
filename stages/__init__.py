"""The pipeline's stages: ``dvc repro`` runs those that are due, ``python -m stages.NAME`` runs one.

This file is imported before any of them, so it holds what must be settled before PyTorch is loaded, and the few lines
that all of them share.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# The same bytes on every x86-64 processor with AVX2: PyTorch and oneDNN would otherwise pick the widest instructions
# that they find, and other widths add up in another order. See also stages/net.py.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
CPUINFO = Path("/proc/cpuinfo")
if CPUINFO.exists() and " avx2 " in CPUINFO.read_text():
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # obeyed unseen: on a processor without AVX2 it would end in SIGILL
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products, where train.device is cuda

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A model's .pt2 file has its weights pickled. Told so, MLflow opens it only if these pickles hold nothing but tensors.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"


MODEL = Path("results/model.safetensors")
HISTORY = Path("results/history.csv")
METRICS = Path("results/metrics.json")
PREDICTIONS = Path("results/predictions.csv")
PLOTS = Path("results/plots")
PUBLISHED = Path("data/published_history.csv")  # the figures that the tutorial prints


class StageError(Exception):
    """What a user can cause and mend: its text says what is wrong, where, and what to do, in one line."""


def run(main: Callable[[], object]) -> None:
    """Run a stage's ``main``; a ``StageError`` or ``OSError`` ends it with one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends a stage as Ctrl-C does
    try:
        main()
    except (StageError, OSError) as error:
        sys.exit(f"{main.__module__ if main.__module__ != '__main__' else Path(sys.argv[0]).stem}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def write(path: Path, content: bytes | str) -> None:
    """Put ``content`` at ``path`` whole or not at all; what was there stays until the last moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise StageError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    finally:
        part.unlink(missing_ok=True)
