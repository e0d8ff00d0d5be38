"""What the stages share, and the commands that use their results.

This file is imported before all others. It sets what must be set before PyTorch is loaded, names the files that the
stages exchange, and holds the few lines that every command needs.
"""

import csv
import importlib.util
import io
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

# `python -m` imports this file before the command itself; until then the command's name is "-m". The imports take
# seconds, and libraries turn a KeyboardInterrupt into errors of their own. So until run_command, Ctrl-C simply ends it.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# PyTorch and oneDNN use the widest instructions that they find, and each width adds in another order. Limited to AVX2,
# they give the same bytes on every x86-64 processor that has it. See also mnist_mlp/net.py.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
CPUINFO = Path("/proc/cpuinfo")
HAS_AVX2 = CPUINFO.exists() and " avx2 " in CPUINFO.read_text()
if HAS_AVX2:  # PyTorch does not check this value: on a processor without AVX2 it would crash
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products, where train.device is cuda

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A model's .pt2 file contains its weights as a pickle. With this setting MLflow opens the file only if that pickle
# holds nothing but tensors.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"

HERE = Path(__file__).resolve().parents[1]  # the folder of this code: the repository, or a copy for one DVC experiment
_ROOT = Path(os.environ.get("DVC_ROOT", HERE)).resolve()
ROOT = (
    _ROOT if _ROOT / ".dvc/tmp" in HERE.parents else HERE
)  # the repository that DVC copied for an experiment, or HERE
CALLER = Path.cwd()  # where the user is; commands work in HERE

# The paths of what the stages exchange, from HERE.
MODEL = Path("results/model.safetensors")
HISTORY = Path("results/history.csv")
METRICS = Path("results/metrics.json")
PREDICTIONS = Path("results/predictions.csv")
PLOTS = Path("results/plots")
PUBLISHED = Path("data/published_history.csv")  # the figures that the tutorial prints; may be missing or empty
FIGURES = ("train_loss", "train_acc", "test_loss", "test_acc")  # of each epoch; and val_loss, val_acc


class UserError(Exception):
    """Something that a user can cause and correct. The text says what is wrong, where, and what to do, in one line."""


def run_command(main: Callable[[], object]) -> None:
    """Run a command's ``main`` in ``HERE``. A ``UserError`` or ``OSError`` ends it with one line and exit status 1.

    If it cannot be run at all, the status is 2: to who asks ``verify``, 1 would mean 'different'.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends a command as Ctrl-C does
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    name = Path(sys.argv[0]).stem
    _check_module()
    _go_home()
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{name}: {error}{_hint()}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # PyTorch's word for too little memory
            raise
        sys.exit(f"{name}: too little memory; lower model.hidden or train.batch_size in params.yaml{_hint()}")
    except KeyboardInterrupt:
        sys.exit(130)


def _check_module() -> None:
    """Refuse `python stages/train.py`, which has loaded PyTorch before this file could set anything."""
    file = Path(sys.argv[0]).resolve()
    if sys.modules["__main__"].__spec__ is None and file.suffix == ".py":
        _refuse(f"run it as `python -m {file.parent.name}.{file.stem}`, in the folder of dvc.yaml")


def _go_home() -> None:
    """Work in the folder of this code, unless the user is in one that has code of its own, such as another clone."""
    code = Path(__file__).resolve().relative_to(HERE)
    own = next((folder for folder in (CALLER, *CALLER.parents) if (folder / code).exists()), HERE)
    if own != HERE:
        _refuse(f"this is the code of {HERE}, and {own} has its own; unset PYTHONSAFEPATH and PYTHONPATH")
    os.chdir(HERE)


def _refuse(text: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).stem}: {text}{_hint()}", file=sys.stderr)
    sys.exit(2)


def _hint() -> str:
    # DVC removes a stage's results before it runs the stage. But not here in an experiment that works in a copy, nor by
    # a stage of the study: those have a colon in their names.
    here = HERE == ROOT and ":" not in os.environ.get("DVC_STAGE", ":")
    results = (MODEL, HISTORY, METRICS, PREDICTIONS, *(PLOTS / f"{name}.png" for name in FIGURES))
    removed = here and not all((HERE / path).exists() for path in results)
    hint = "; DVC has removed results: when this is mended, `dvc repro` makes them, or takes them from its cache"
    return hint if removed else ""


def cpu() -> str:
    """Name the processor."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def published_history() -> list[dict[str, float]]:
    """Read the figures that the tutorial prints, one row an epoch. There are none if the file is missing or empty.

    Raises:
        UserError: the file is no table of numbers with a column for each figure.
    """
    if not (HERE / PUBLISHED).exists():
        return []
    try:
        with (HERE / PUBLISHED).open(encoding="utf-8") as file:
            history = [{name: float(row[name]) for name in ("epoch", *FIGURES)} for row in csv.DictReader(file)]
        if [row["epoch"] for row in history] != list(range(len(history))) or "nan" in str(history):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        columns = ", ".join(FIGURES)
        wanted = f"each row needs the epoch, from 0, and numbers in the columns {columns}"
        raise UserError(f"{PUBLISHED}: {wanted}; `git checkout {PUBLISHED}` restores it") from None
    return history


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, str]]) -> str:
    """Write rows as the content of a CSV file; what a row lacks is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path: Path, content: bytes | str) -> None:
    """Write ``content`` to ``path``, all of it or nothing: until the end, the old file stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write at once
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from error
    finally:
        part.unlink(missing_ok=True)


if sys.argv[0] == "-m":  # a command, whose own imports come next
    _missing = [name for name in ("torch", "mlflow", "dvc") if importlib.util.find_spec(name) is None]
    if _missing:
        sys.argv[0] = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
        _refuse(f"{sys.executable} has no {', '.join(_missing)}; type `make setup`, then `source .venv/bin/activate`")
