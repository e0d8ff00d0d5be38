"""Say what the pipeline gave, and whether its results are the committed ones. ``make repro`` ends with it.

``python -m mnist_mlp.verdict --check`` is for CI: its exit status is 1 if the bytes are others where they should be the
same, or if ``dvc.lock`` is not the committed one.
"""

import argparse
import csv
import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any

from mnist_mlp import HAS_AVX2, METRICS, PLOTS, PUBLISHED, UserError, lineage, params, run_command
from mnist_mlp.params import Params


def main() -> None:
    """Print the figures, where to look, and the verdict."""
    parser = argparse.ArgumentParser(
        prog="python -m mnist_mlp.verdict", description="Compare with the committed results."
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if bytes differ that should be the same")
    check = parser.parse_args().check
    config = params.load()
    if not METRICS.exists():
        raise UserError(f"{METRICS} is missing; `dvc repro` makes it")
    try:
        metrics = json.loads(METRICS.read_text())
    except ValueError:
        raise UserError(f"{METRICS} {lineage.DAMAGED}") from None
    with PUBLISHED.open() as file:
        published = float(list(csv.DictReader(file))[-1]["test_acc"])
    reached = "reached" if metrics["accuracy"] >= config.evaluate.target_accuracy else "missed"
    print(f"""
test accuracy   {metrics["accuracy"]:.2%} of 10,000 images (target {reached})
mean of batches {metrics["batch_mean_accuracy"]:.4%}, published {published:.4%}
plots           {PLOTS}
""")
    lines, expected = compare(config)
    print(*lines, sep="\n")
    if check and not expected:
        sys.exit(1)


def compare(config: Params) -> tuple[list[str], bool]:
    """Compare the results with those that HEAD's ``dvc.lock`` records.

    Returns:
        What to tell the user, and whether this is as it should be for committed parameters and code.
    """
    committed_lock = _committed(lineage.LOCK)
    if committed_lock is None:
        return ["no results are committed yet; `git add dvc.lock results && git commit` keeps these"], True
    stages = lineage.locked_stages(committed_lock, Path("dvc.yaml").read_bytes())
    committed = lineage.outputs(stages)
    if missing := [path for path in committed if not Path(path).exists()]:
        return [f"incomplete: {', '.join(missing)} missing; `dvc repro` makes what is missing"], False
    different = [path for path, md5 in committed.items() if lineage.file_md5(path) != md5]
    if not different:
        lines = ["reproduced: every byte of model, history, metrics and plots is the committed one"]
        same_lock = lineage.LOCK.read_bytes() == committed_lock
        if not same_lock:
            lines.append("dvc.lock has changed with parameters or code; commit it together with them")
        return lines, same_lock
    named = ", ".join([*missing, *different][:3]) + (" ..." if len(missing) + len(different) > 3 else "")
    lines = [
        f"different: {len(different) + len(missing)} of {len(committed)} files are not the committed ones: {named}"
    ]
    edits = _edits(config, stages)
    if edits:
        return [*lines, *(f"likely reason: {edit}" for edit in edits)], False
    reason = _other_arithmetic(config)
    if reason:
        return [*lines, f"this is expected: {reason}", *_distance()], True
    return [*lines, f"likely reason: {_other_versions()}", *_distance()], False


def _edits(config: Params, recorded: dict[str, Any]) -> list[str]:
    """List the parameters and code files that are not those of the committed ``dvc.lock``."""
    after, before = config.flat(), lineage.parameters(recorded)
    edits = [
        f"{name} is {after.get(name)}, in dvc.lock {before[name]}" for name in before if after.get(name) != before[name]
    ]
    patch = lineage.patch()
    if patch is None:
        return [*edits, "Git cannot tell which code files are edited"]
    edited = re.findall(r"^diff --git a/.* b/(.*)$", patch.decode(errors="replace"), re.MULTILINE)
    made = lineage.outputs(recorded)
    used = {dep["path"]: dep["md5"] for stage in recorded.values() for dep in stage.get("deps", [])}
    stale = [
        path
        for path, md5 in used.items()
        if path not in (*edited, *made) and Path(path).is_file() and lineage.file_md5(path) != md5
    ]
    return [
        *edits,
        *(f"{file} is edited" for file in edited),
        *(f"{file} is committed, but dvc.lock is of an older one; commit dvc.lock and results" for file in stale),
    ]


def _other_arithmetic(config: Params) -> str | None:
    """Say why this machine computes other bytes, if it does."""
    if config.train.device == "cuda":
        return "a GPU adds in another order than a CPU"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"a {platform.machine()} processor adds in another order than an x86-64 one"
    if not HAS_AVX2:
        return "this processor has no AVX2, or the system does not say so"
    return None


def _other_versions() -> str:
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", Path("requirements.txt").read_text(), re.MULTILINE))
    for name in ("torch", "numpy", "matplotlib"):
        if (version := importlib.metadata.version(name)) != locked.get(name):
            return f"{name} is {version}, and requirements.txt has {locked.get(name)}"
    return "unknown; parameters, code, processor and versions are as they should be. Please report this"


def _distance() -> list[str]:
    """Say how far the figures are from the committed ones."""
    content = _committed(METRICS)
    if content is None:
        return []
    before, after = json.loads(content), json.loads(METRICS.read_text())
    return [f"{name} is {after[name]}, committed {before[name]}" for name in ("accuracy", "loss")]


def _committed(path: Path) -> bytes | None:
    found = lineage.git("show", f"HEAD:{path}")
    if found.returncode == 0:
        return found.stdout
    lineage.check_git()
    return None


if __name__ == "__main__":
    run_command(main)
