"""Git: the commit that a result comes from, and the changes that are not committed."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import lineage
from lineage import UserError, lock

UNKNOWN = "unknown"


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run Git in this folder, without hooks, and whatever repository the caller's environment names."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", "core.quotePath=false", "-c", "core.hooksPath=/dev/null", *arguments]
    return subprocess.run(command, env=clean | (env or {}), capture_output=True, check=False)


def commit() -> str:
    """Name the commit that this folder started from, or say ``unknown``."""
    # DVC runs experiments in copies of the repository, on top of the commit that it names in this variable.
    revision = os.environ.get("DVC_EXP_BASELINE_REV") or "HEAD"
    found = run("rev-parse", "--verify", f"{revision}^{{commit}}")
    return UNKNOWN if found.returncode else found.stdout.decode().strip()


def has_commit(name: str) -> bool:
    """Look whether a commit is in this repository. Git may have removed one that was amended or rebased."""
    return run("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").returncode == 0


def keeps_experiments() -> bool:
    """Look whether DVC can keep an experiment here. In a shallow clone it keeps none, and reports success."""
    return run("-C", str(lineage.ROOT), "rev-parse", "--is-shallow-repository").stdout.strip() != b"true"


def check() -> None:
    """Raise a UserError with Git's own words if Git does not work here at all."""
    found = run("rev-parse", "--git-dir")
    if found.returncode:
        raise UserError(f"Git fails: {' '.join(found.stderr.decode(errors='replace').split())}")


def patch() -> bytes | None:
    """Give the changes since the commit to files that the pipeline depends on, new files included.

    Returns:
        A patch for ``git apply``, empty if there are no changes; None if Git cannot tell.

    Raises:
        UserError: this folder lies inside of a repository, from which nothing could be run again.
    """
    if inside := run("rev-parse", "--show-prefix").stdout.strip():
        name = inside.decode(errors="replace")
        raise UserError(f"this is the folder {name} of a Git repository; it needs a repository of its own")
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}  # the user's own index stays as it is
        if run("read-tree", commit(), env=index).returncode or (code := _code(index)) is None:
            return None
        if run("--literal-pathspecs", "add", "--all", "--", *code, env=index).returncode:
            return None
        changes = run("diff-index", "--cached", "--patch", "--binary", "--no-ext-diff", commit(), env=index)
    return None if changes.returncode else changes.stdout


def branch() -> str:
    """Name the repository's branch."""
    return run("-C", str(lineage.ROOT), "rev-parse", "--abbrev-ref", "HEAD").stdout.decode().strip()


def changed_files(patch: bytes) -> list[str]:
    """List the files that a patch changes."""
    return re.findall(r"^diff --git a/.* b/(.*)$", patch.decode(errors="replace"), re.MULTILINE)


def _code(index: dict[str, str] | None = None) -> list[str] | None:
    """List the files that stages depend on, but for results and what Git ignores; None if Git fails."""
    stages = lock.pipeline_stages(Path("dvc.yaml").read_bytes()).values()
    made = [Path(path) for stage in stages for path in lock.paths(stage)]
    needed = {Path(dependency) for stage in stages for dependency in stage.get("deps", [])}
    inside = [str(path) for path in needed if not path.is_absolute() and ".." not in path.parts]
    listed = run("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "dvc.yaml", *inside, env=index)
    if listed.returncode:
        return None
    written = {*made, *(output.parent / ".gitignore" for output in made)}  # by the stages, and by DVC beside them
    files = map(Path, filter(None, listed.stdout.decode(errors="surrogateescape").split("\0")))
    return sorted({str(file) for file in files if written.isdisjoint([file, *file.parents])})
