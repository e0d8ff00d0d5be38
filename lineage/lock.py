"""``dvc.lock``: what DVC has recorded of each stage - its parameters, what it depends on, and what it has made."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lineage import UserError, file_md5

LOCK = Path("dvc.lock")
DAMAGED = "is damaged, or in a merge; run `git checkout HEAD -- '*dvc.lock' results`, then `dvc repro`"
TRACK = "track"  # the stage that records the others; DVC writes its own entry when it has ended


def recorded(params: Mapping[str, object]) -> dict[str, Any]:
    """Read the stages of ``dvc.lock`` on which the one that records them depends.

    DVC may run others after it, so these are no part of the state.

    Args:
        params: the present parameters by their dotted names.

    Raises:
        UserError: a command, parameter, dependency or result is not the recorded one, so the results are not of this
            state.
    """
    pipeline = pipeline_stages(Path("dvc.yaml").read_bytes())
    upstream = _upstream(pipeline, TRACK) - {TRACK} if TRACK in pipeline else pipeline.keys()
    try:
        locked = read_stages(LOCK.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {LOCK}, so there are no results yet; run `dvc repro`") from None
    frozen = [name for name, stage in pipeline.items() if stage.get("frozen")]
    advice = f"run `dvc unfreeze {' '.join(frozen)}`, then `dvc repro`" if frozen else "run `dvc repro`"
    needed = [name for name in pipeline if name in upstream]
    for name in needed:
        if name not in locked:
            raise UserError(f"stage {name} has not run; {advice}")
        if str(pipeline[name].get("cmd")).replace("\\${", "${") != str(locked[name].get("cmd")):
            raise UserError(f"the command of stage {name} has changed since it last ran; {advice}")
    stages = {name: locked[name] for name in needed}
    for key, value in parameters(stages).items():
        if (now := params.get(key, "missing")) != value:
            raise UserError(f"params.yaml: {key} is {now}, and the results were made with {value}; {advice}")
    present: dict[str, str | None] = {}
    for name, stage in stages.items():
        for path, digest in (dependencies({name: stage}) | results({name: stage})).items():
            if path not in present:
                present[path] = path_md5(path)
            if present[path] is None:
                raise UserError(f"{path} is missing; {advice}")
            if present[path] != digest:
                raise UserError(f"{path} has changed since stage {name} last ran; {advice}")
    return stages


def path_md5(path: str) -> str | None:
    """Hash a file or folder as DVC does, without what ``.dvcignore`` names; None if there is neither."""
    if not Path(path).is_dir():
        return file_md5(path)
    from dvc.fs import localfs  # here: it takes half a second to load, which files do not need
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build

    with Repo() as repo:
        _, _, tree = build(repo.cache.local, path, localfs, "md5", ignore=repo.dvcignore, dry_run=True)
    return str(tree.hash_info.value)


def read_stages(content: bytes) -> dict[str, Any]:
    """Give the stages of ``dvc.lock`` or ``dvc.yaml``, read as DVC does: for other readers of YAML, 1e-05 is text.

    Raises:
        UserError: it is not such a file, such as in a merge with conflicts.
    """
    try:
        stages: dict[str, dict[str, Any]] = YAML(typ="safe").load(content)["stages"]
        return {name: dict(stage) for name, stage in stages.items()}
    except (YAMLError, TypeError, KeyError, AttributeError, ValueError):
        raise UserError(f"dvc.lock or dvc.yaml {DAMAGED}") from None


def pipeline_stages(content: bytes) -> dict[str, Any]:
    """Give the stages of the ``dvc.yaml`` of this folder.

    Raises:
        UserError: as ``read_stages``, or a stage has what only DVC itself can read.
    """
    stages = read_stages(content)
    for name, stage in stages.items():
        named = {file for entry in stage.get("params", []) if isinstance(entry, Mapping) for file in entry}
        if (
            {"foreach", "matrix", "wdir"} & stage.keys()
            or re.search(r"(?<!\\)\$\{", str(stage))
            or named - {"params.yaml"}
        ):
            raise UserError(
                f"dvc.yaml: stage {name} has foreach, matrix, wdir, ${{...}} or a file of parameters, which is not "
                "read here; write it out, with its parameters in params.yaml"
            )
    return stages


def paths(stage: Mapping[str, Any]) -> list[str]:
    """Give the paths that a stage of ``dvc.yaml`` makes."""
    outs = [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
    return [next(iter(out)) if isinstance(out, Mapping) else out for out in outs]


def read_params(content: bytes) -> dict[str, object]:
    """Give the parameters of a params.yaml by their dotted names, read as DVC does: ``{"train.lr": 0.1, ...}``.

    Raises:
        UserError: it is not such a file.
    """
    try:
        return dict(_flat(YAML(typ="safe").load(content)))
    except (YAMLError, AttributeError, ValueError):
        raise UserError("params.yaml holds no parameters by name, such as `lr: 0.1`") from None


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def locked_stages(lock: bytes, pipeline: bytes) -> dict[str, Any]:
    """Give the stages of a ``dvc.lock`` that ``without_track`` names; DVC keeps the entries of others, too."""
    names = without_track(pipeline)
    return {name: stage for name, stage in read_stages(lock).items() if name in names}


def without_track(pipeline: bytes) -> list[str]:
    """Name the stages of a ``dvc.yaml`` that can be run without ``TRACK``: neither it nor what depends on it."""
    stages = pipeline_stages(pipeline)
    return [name for name in stages if TRACK not in _upstream(stages, name)]


def _upstream(stages: Mapping[str, Any], name: str) -> set[str]:
    """Name the stages of a ``dvc.yaml`` on which one depends, and itself."""
    found, new = {name}, {name}
    while new:
        needed = [Path(path) for known in new for path in stages[known].get("deps", [])]
        new = {
            other
            for other in stages.keys() - found
            for made in map(Path, paths(stages[other]))
            if any(made.is_relative_to(path) or path.is_relative_to(made) for path in needed)
        }
        found |= new
    return found


def results(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each file and folder that the stages of a ``dvc.lock`` have made, by path."""
    return _hashes(stages, "outs")


def dependencies(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each file and folder that the stages of a ``dvc.lock`` depend on, by path."""
    return _hashes(stages, "deps")


def _hashes(stages: dict[str, Any], kind: str) -> dict[str, str]:
    files = [file for stage in stages.values() for file in stage.get(kind, [])]  # a URL is left to DVC
    return {file["path"]: file["md5"] for file in files if "md5" in file and "://" not in file["path"]}


def parameters(stages: dict[str, Any]) -> dict[str, Any]:
    """Give the parameters that the stages of a ``dvc.lock`` record, each by its dotted name."""
    values: dict[str, Any] = {}
    for stage in stages.values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            values |= dict(_flat({key: value}))
    return values
