"""What a result comes from: the commit, the changes that are not committed, and what DVC has recorded in dvc.lock."""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_mlp import ROOT, UserError
from mnist_mlp.params import Params

LOCK = Path("dvc.lock")
UNKNOWN = "unknown"
DAMAGED = "is damaged, or in a merge; run `git checkout HEAD -- dvc.lock study/dvc.lock results`, then `dvc repro`"
TRACK = "track"  # the stage that records the others; DVC writes its own entry when it has ended


def md5(content: bytes) -> str:
    """Hash a file's content as DVC does."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def git(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run Git in this folder, without hooks, and whatever repository the caller's environment names."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "core.quotePath=false", "-c", "core.hooksPath=/dev/null", *arguments]
    return subprocess.run(command, env=clean | (env or {}), capture_output=True, check=False)


def commit() -> str:
    """Name the commit that this folder started from, or say ``unknown``."""
    # DVC runs experiments in copies of the repository, on top of the commit that it names in this variable.
    revision = os.environ.get("DVC_EXP_BASELINE_REV") or "HEAD"
    found = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    return UNKNOWN if found.returncode else found.stdout.decode().strip()


def has_commit(name: str) -> bool:
    """Look whether a commit is in this repository. Git may have removed one that was amended or rebased."""
    return git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").returncode == 0


def keeps_experiments() -> bool:
    """Look whether DVC can keep an experiment here. In a shallow clone it keeps none, and reports success."""
    return git("-C", str(ROOT), "rev-parse", "--is-shallow-repository").stdout.strip() != b"true"


def check_git() -> None:
    """Raise a UserError with Git's own words if Git does not work here at all."""
    found = git("rev-parse", "--git-dir")
    if found.returncode:
        raise UserError(f"Git fails: {' '.join(found.stderr.decode(errors='replace').split())}")


def patch() -> bytes | None:
    """Give the changes since the commit to files that the pipeline depends on, new files included.

    Returns:
        A patch for ``git apply``, empty if there are no changes; None if Git cannot tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}  # the user's own index stays as it is
        if git("read-tree", commit(), env=index).returncode or (code := _code(index)) is None:
            return None
        if git("--literal-pathspecs", "add", "--all", "--", *code, env=index).returncode:
            return None
        changes = git("diff-index", "--cached", "--patch", "--binary", "--no-ext-diff", commit(), env=index)
    return None if changes.returncode else changes.stdout


def changed_files(patch: bytes) -> list[str]:
    """List the files that a patch changes."""
    return re.findall(r"^diff --git a/.* b/(.*)$", patch.decode(errors="replace"), re.MULTILINE)


def code_md5() -> str:
    """Hash the files that the pipeline depends on, as they are now: the same before and after a commit of them."""
    code = _code()
    if code is None:
        return UNKNOWN
    hashes = {path: file_md5(path) for path in code}
    return md5(json.dumps({path: found for path, found in hashes.items() if found}, sort_keys=True).encode())


def _code(index: dict[str, str] | None = None) -> list[str] | None:
    """List the files that stages depend on, but for results and what Git ignores; None if Git fails."""
    stages = read_stages(Path("dvc.yaml").read_bytes()).values()
    made = [Path(next(iter(out)) if isinstance(out, dict) else out) for stage in stages for out in _outputs(stage)]
    needed = {Path(dependency) for stage in stages for dependency in stage.get("deps", [])}
    inside = [str(path) for path in needed if not path.is_absolute() and ".." not in path.parts]
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "dvc.yaml", *inside, env=index)
    if listed.returncode:
        return None
    written = {*made, *(output.parent / ".gitignore" for output in made)}  # by the stages, and by DVC beside them
    files = map(Path, filter(None, listed.stdout.decode(errors="surrogateescape").split("\0")))
    return sorted({str(file) for file in files if written.isdisjoint([file, *file.parents])})


def _outputs(stage: dict[str, Any]) -> list[Any]:
    return [output for kind in ("outs", "metrics", "plots") for output in stage.get(kind, [])]


def recorded(config: Params) -> dict[str, Any]:
    """Read the stages of ``dvc.lock`` that dvc.yaml still has, but for the one that records the others.

    Raises:
        UserError: a parameter, dependency or result is not the recorded one, so the results are not of this state.
    """
    try:
        stages = locked_stages(LOCK.read_bytes(), Path("dvc.yaml").read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {LOCK}, so there are no results yet; run `dvc repro`") from None
    frozen = [name for name, stage in read_stages(Path("dvc.yaml").read_bytes()).items() if stage.get("frozen")]
    advice = f"run `dvc unfreeze {' '.join(frozen)}`, then `dvc repro`" if frozen else "run `dvc repro`"
    for key, value in parameters(stages).items():
        if (now := config.flat().get(key)) != value:
            raise UserError(f"params.yaml: {key} is {now}, and the results were made with {value}; {advice}")
    for name, stage in stages.items():
        for file in [*stage.get("deps", []), *stage.get("outs", [])]:
            path = file["path"]
            if not Path(path).exists():
                raise UserError(f"{path} is missing; {advice}")
            if file_md5(path) not in (file["md5"], None):  # None for a folder
                raise UserError(f"{path} has changed since stage {name} last ran; {advice}")
    return stages


def read_stages(content: bytes) -> dict[str, Any]:
    """Give the stages of ``dvc.lock`` or ``dvc.yaml``, read as DVC does: for other readers of YAML, 1e-05 is text.

    Raises:
        UserError: it is not such a file, such as in a merge with conflicts.
    """
    try:
        stages: dict[str, Any] = YAML(typ="safe").load(content)["stages"]
    except (YAMLError, TypeError, KeyError):
        raise UserError(f"dvc.lock or dvc.yaml {DAMAGED}") from None
    return stages


def locked_stages(lock: bytes, pipeline: bytes) -> dict[str, Any]:
    """Give the stages of a ``dvc.lock`` that its dvc.yaml has, but for ``TRACK``: DVC keeps the entries of others."""
    names = read_stages(pipeline).keys() - {TRACK}
    return {name: stage for name, stage in read_stages(lock).items() if name in names}


def outputs(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each result that the stages of a ``dvc.lock`` record, by path; the data are no result."""
    files = [file for stage in stages.values() for file in stage.get("outs", [])]
    return {file["path"]: file["md5"] for file in files if not file["md5"].endswith(".dir")}


def dependencies(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each file and folder that the stages of a ``dvc.lock`` depend on, by path."""
    return {file["path"]: file["md5"] for stage in stages.values() for file in stage.get("deps", [])}


def parameters(stages: dict[str, Any]) -> dict[str, Any]:
    """Give the parameters that the stages of a ``dvc.lock`` record, named as ``Params.flat`` does."""
    values: dict[str, Any] = {}
    for stage in stages.values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            values |= {key: value} if "." in key else {f"{key}.{name}": item for name, item in value.items()}
    return values


def file_md5(path: str) -> str | None:
    """Hash a file; None if there is none."""
    return md5(Path(path).read_bytes()) if Path(path).is_file() else None
