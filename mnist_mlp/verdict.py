"""Say what the pipeline gave, and whether its results are the committed ones. ``make repro`` ends with it.

``python -m mnist_mlp.verdict --check`` is for CI: its exit status is 1 if the bytes are others where they should be the
same, or if ``dvc.lock`` is not the committed one.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lineage
from lineage import UserError, git, lock, run_command
from mnist_mlp import params
from mnist_mlp.params import Params
from mnist_mlp.published import published_history
from mnist_mlp.recipe import METRICS, PLOTS, data


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
        accuracy, batch_mean = (float(metrics[name]) for name in ("accuracy", "batch_mean_accuracy"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{METRICS} {lock.DAMAGED}") from None
    published = "".join(f", published {row['test_acc']:.4%}" for row in published_history()[-1:])
    reached = "reached" if accuracy >= config.evaluate.target_accuracy else "missed"
    print(f"""
test accuracy   {accuracy:.2%} of {data.SIZES["t10k"]:,} images (target {reached})
mean of batches {batch_mean:.4%}{published}
plots           {PLOTS}
""")
    lines, expected = compare(config)
    for line in lines:
        print(textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    if check and not expected:
        sys.exit(1)


def compare(config: Params) -> tuple[list[str], bool]:
    """Compare the results with those that HEAD's ``dvc.lock`` records.

    Returns:
        What to tell the user, and whether this is as it should be for committed parameters and code.
    """
    committed_lock = _committed(lock.LOCK)
    if committed_lock is None:
        return ["no results are committed yet; `git add dvc.lock results && git commit` keeps these"], True
    stages = lock.locked_stages(committed_lock, Path("dvc.yaml").read_bytes())
    committed = lock.results(stages)
    if missing := [path for path in committed if not Path(path).exists()]:
        return [f"incomplete: {', '.join(missing)} missing; `dvc repro` makes what is missing"], False
    different = [path for path, md5 in committed.items() if lock.path_md5(path) != md5]
    if not different:
        try:
            lock.recorded(config.flat())
        except UserError as error:  # such as an edit that nobody has run
            return [f"the committed bytes, but {error}"], False
        lines = ["reproduced: model, history, metrics and plots are the committed bytes"]
        if versions := _other_versions():
            lines.append(f"though {versions}")
        same_lock = lock.LOCK.read_bytes() == committed_lock
        if not same_lock:
            lines.append("dvc.lock has changed with parameters or code; commit it together with them")
        return lines, same_lock
    named = ", ".join(different[:3]) + (" ..." if len(different) > 3 else "")
    lines = [f"different: {len(different)} of {len(committed)} files are not the committed ones: {named}"]
    # A stage whose results are all as they were has no part in it, such as `download` with another mirror.
    to_blame = {name: stage for name, stage in stages.items() if lock.results({name: stage}).keys() & {*different}}
    if edits := _edits(config, to_blame, stages) or _edited_results(different):
        return [*lines, *(f"likely reason: {edit}" for edit in edits)], False
    if reason := _other_arithmetic():
        return [*lines, f"this is expected: {reason}", *_distance()], True
    return [*lines, f"likely reason: {_other_versions() or _other_layers(config)}", *_distance()], False


def _edits(config: Params, to_blame: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    """List the parameters and code files of some stages that are not those of the committed ``dvc.lock``.

    Args:
        config: the present parameters.
        to_blame: the stages whose results are others.
        stages: all stages of the committed ``dvc.lock``.
    """
    after, before = config.flat(), lock.parameters(to_blame)
    changed = [name for name in before if after.get(name) != before[name]]
    edits = [f"{name} is {after.get(name, 'missing')}, in the committed dvc.lock {before[name]}" for name in changed]
    patch = git.patch()
    if patch is None:
        return [*edits, "Git cannot tell which code files are edited"]
    used = lock.dependencies(to_blame)
    elsewhere = lock.dependencies({name: stage for name, stage in stages.items() if name not in to_blame})
    edited = git.changed_files(patch)
    made = [out["path"] for stage in stages.values() for out in stage.get("outs", [])]
    stale = [
        path
        for path, md5 in used.items()
        if not any(_is_in(file, [path]) for file in (*edited, *made)) and lock.path_md5(path) not in (md5, None)
    ]
    return [
        *edits,
        *(f"{file} is edited" for file in edited if _is_in(file, used) or not _is_in(file, elsewhere)),
        *(f"{file} is committed, but dvc.lock is of an older one; commit dvc.lock and results" for file in stale),
    ]


def _is_in(file: str, paths: Iterable[str]) -> bool:
    """Look whether a file is one of some paths, or lies in one that is a folder."""
    return not {file, *map(str, Path(file).parents)}.isdisjoint(paths)


def _edited_results(different: list[str]) -> list[str]:
    """Name the results that are not those that the present ``dvc.lock`` records, such as a damaged file."""
    made = lock.results(lock.read_stages(lock.LOCK.read_bytes())) if lock.LOCK.exists() else {}
    edited = [path for path in different if lock.path_md5(path) != made.get(path)]
    return [f"{path} is not what the pipeline has made here; run `dvc repro`" for path in edited]


def _other_arithmetic() -> str | None:
    """Say why this machine computes other bytes, if it does: SGD has the same ones with fused multiply-add only."""
    import torch

    if platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "PyTorch uses no AVX2 here, because the processor has none, or ATEN_CPU_CAPABILITY says so"
    return None


def _other_versions() -> str | None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", Path("requirements.txt").read_text(), re.MULTILINE))
    here = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "matplotlib")}
    other = [name for name, version in here.items() if version.partition("+")[0] != locked.get(name)]
    return "; ".join(f"{name} is {here[name]}, and requirements.txt has {locked.get(name)}" for name in other) or None


def _other_layers(config: Params) -> str:
    """Name the layers of the net whose bytes are not promised on every processor."""
    from mnist_mlp.recipe import exact, net

    model = net.mlp(config.model.hidden)
    owners = {name.rpartition(".")[0] for name in model.state_dict()}  # of weights and other numbers
    layers = {type(layer) for name, layer in model.named_modules() if name in owners} - {exact.Linear}
    if layers:
        names = ", ".join(sorted(layer.__name__ for layer in layers))
        return f"{names}: of all layers, only Linear of recipe/exact.py has the same bytes on every kind of processor"
    return (
        "unknown; parameters, code and versions are as they should be. docs/bytes.md names the machines that gave the "
        f"committed bytes, and this one is {lineage.cpu()} ({platform.machine()}). Please report both"
    )


def _distance() -> list[str]:
    """Say how far the figures are from the committed ones."""
    content = _committed(METRICS)
    if content is None:
        return []
    before, after = json.loads(content), json.loads(METRICS.read_text())
    return [f"{name} is {after[name]}, committed {before[name]}" for name in ("accuracy", "loss")]


def _committed(path: Path) -> bytes | None:
    found = git.run("show", f"HEAD:{path}")
    if found.returncode == 0:
        return found.stdout
    git.check()
    return None


if __name__ == "__main__":
    run_command(main)
