"""The link between Git, DVC and MLflow, for any project: a number leads back to its commit, data and parameters.

The folder knows nothing of the project around it. This file holds what every command of a project needs: errors for
people, atomic writes, and the folder in which commands work.
"""

import hashlib
import importlib.util
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parents[1]  # the folder of this code: the repository, or a copy for one DVC experiment
_ROOT = Path(os.environ.get("DVC_ROOT", HERE)).resolve()
ROOT = (
    _ROOT if _ROOT / ".dvc/tmp" in HERE.parents else HERE
)  # the repository that DVC copied for an experiment, or HERE
CALLER = Path.cwd()  # where the user is; commands work in HERE
CPUINFO = Path("/proc/cpuinfo")

# `python -m` imports this file before the command itself; until then the command's name is "-m". The imports take
# seconds, and libraries turn a KeyboardInterrupt into errors of their own. So until run_command, Ctrl-C simply ends it.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
        sys.exit(f"{name}: too little memory; lower the sizes of layers and batches in params.yaml{_hint()}")
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
    # DVC removes most results of a stage before it runs it. A stage of the study, with a colon in its name, goes on.
    in_repro = "DVC_STAGE" in os.environ and ":" not in os.environ["DVC_STAGE"] and HERE == ROOT
    hint = "; when this is mended, `dvc repro` makes what DVC has removed, or takes it from its cache"
    return hint if in_repro else ""


def require(*packages: str) -> None:
    """End a command, before its own imports, with one line if this Python lacks a package that it needs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and sys.argv[0] == "-m":
        sys.argv[0] = sys.orig_argv[sys.orig_argv.index("-m") + 1].rpartition(".")[2]
        _refuse(f"{sys.executable} has no {', '.join(missing)}; type `make setup`, then `source .venv/bin/activate`")


def cpu() -> str:
    """Name the processor."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def md5(content: bytes) -> str:
    """Hash a file's content as DVC does."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def file_md5(path: str) -> str | None:
    """Hash a file; None if there is none."""
    return md5(Path(path).read_bytes()) if Path(path).is_file() else None


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
        with suppress(OSError):  # none, or a disk on which nothing can be removed
            part.unlink()
