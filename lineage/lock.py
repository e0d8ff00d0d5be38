"""``dvc.lock``: what DVC has recorded of each stage - its parameters, what it depends on, and what it has made."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lineage import UserError, file_md5

LOCK = Path("dvc.lock")
DAMAGED = "is damaged, or in a merge; run `git checkout HEAD -- dvc.lock study/dvc.lock results`, then `dvc repro`"
TRACK = "track"  # the stage that records the others; DVC writes its own entry when it has ended


def recorded(params: Mapping[str, object]) -> dict[str, Any]:
    """Read the stages of ``dvc.lock`` that dvc.yaml still has, but for the one that records the others.

    Args:
        params: the present parameters by their dotted names.

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
        if (now := params.get(key)) != value:
            raise UserError(f"params.yaml: {key} is {now}, and the results were made with {value}; {advice}")
    present: dict[str, str | None] = {}
    for name, stage in stages.items():
        for file in [*stage.get("deps", []), *stage.get("outs", [])]:
            path = file["path"]
            if path not in present:
                present[path] = path_md5(path)
            if present[path] is None:
                raise UserError(f"{path} is missing; {advice}")
            if present[path] != file["md5"]:
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
        UserError: it is not such a file, such as in a merge with conflicts, or a stage stands for several.
    """
    try:
        stages: dict[str, Any] = YAML(typ="safe").load(content)["stages"]
        templates = [name for name, stage in stages.items() if {"foreach", "matrix"} & stage.keys()]
    except (YAMLError, TypeError, KeyError, AttributeError):
        raise UserError(f"dvc.lock or dvc.yaml {DAMAGED}") from None
    if templates:
        raise UserError(f"dvc.yaml: stage {templates[0]} is a foreach or matrix, which is not read here; write it out")
    return stages


def read_params(content: bytes) -> dict[str, object]:
    """Give the parameters of a params.yaml by their dotted names, read as DVC does: ``{"train.lr": 0.1, ...}``.

    Raises:
        UserError: it is not such a file.
    """
    try:
        return dict(_flat(YAML(typ="safe").load(content)))
    except (YAMLError, AttributeError, ValueError):
        raise UserError("params.yaml holds no parameters by name") from None


def _flat(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def locked_stages(lock: bytes, pipeline: bytes) -> dict[str, Any]:
    """Give the stages of a ``dvc.lock`` that its dvc.yaml has, but for ``TRACK``: DVC keeps the entries of others."""
    names = read_stages(pipeline).keys() - {TRACK}
    return {name: stage for name, stage in read_stages(lock).items() if name in names}


def results(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each result that the stages of a ``dvc.lock`` record, by path; the data are no result."""
    files = [file for stage in stages.values() for file in stage.get("outs", [])]
    return {file["path"]: file["md5"] for file in files if not file["md5"].endswith(".dir")}


def dependencies(stages: dict[str, Any]) -> dict[str, str]:
    """Give the MD5 of each file and folder that the stages of a ``dvc.lock`` depend on, by path."""
    return {file["path"]: file["md5"] for stage in stages.values() for file in stage.get("deps", [])}


def parameters(stages: dict[str, Any]) -> dict[str, Any]:
    """Give the parameters that the stages of a ``dvc.lock`` record, each by its dotted name."""
    values: dict[str, Any] = {}
    for stage in stages.values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            values |= dict(_flat({key: value}))
    return values
