"""``params.yaml``: every number that a user may change. Those of the recipe have their types and ranges there.

``python -m mnist_mlp.params`` checks the file, as every stage does that runs; ``make repro`` begins with it.
"""

import reprlib
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

import lineage
from lineage import UserError, run_command
from mnist_mlp.recipe.params import VARIABLE, Count, Recipe, Section

PARAMS = Path("params.yaml")


class Plot(Section):
    """How the plots look."""

    dpi: Annotated[int, Field(ge=50, le=400)]
    wrong_digits: Annotated[int, Field(ge=1, le=100)]


class Study(Section):
    """The recipe with many seeds, and with other values of some parameters; see study/dvc.yaml."""

    seeds: Count  # each setting is trained with the seeds 1 to this number
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]]  # {"train.lr": [0.03, 0.1]}


class Params(Recipe):
    """The whole of ``params.yaml``; a section for each stage that has parameters."""

    plot: Plot
    study: Study

    def settings(self) -> list[dict[str, object]]:
        """List what the study compares: every combination of ``study.vary``. One without changes if nothing varies."""
        names = self.study.vary.keys()
        return [dict(zip(names, values, strict=True)) for values in product(*self.study.vary.values())]


_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = 100


def _short(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits, which can be written as 0xfff...
        return "a number of thousands of digits"


def load(path: Path | None = None) -> Params:
    """Read and check the parameters, of this repository unless told.

    Raises:
        UserError: no such file, broken YAML, or a key that is unknown, missing, of a wrong type or out of range.
    """
    path = path or lineage.HERE / PARAMS
    try:
        config = Params.model_validate(_parse(path))
    except FileNotFoundError:
        raise UserError(f"{path.name}: no such file; `git checkout {path.name}` restores it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name}: not a UTF-8 text file; `git checkout {path.name}` restores it") from None
    except ValidationError as error:
        raise UserError(f"{path.name}: {_problem(error, path)}") from None
    _check_vary(config, path)
    return config


def _check_vary(config: Params, path: Path) -> None:
    """Check each value of ``study.vary`` as if it stood in its own place."""
    for name, values in config.study.vary.items():
        if name not in VARIABLE:
            raise UserError(
                f"{path.name}: study.vary: {_short(name)} is no parameter that decides what a training gives (the "
                f"seeds are those of study.seeds); allowed: {', '.join(VARIABLE)}"
            )
        for position, value in enumerate(values):
            try:
                config.replaced({name: value})
            except ValidationError as error:
                raise UserError(f"{path.name}: study.vary: {_problem(error, path)}") from None
            if value in values[:position]:
                raise UserError(f"{path.name}: study.vary: {name} has {_short(value)} twice; leave one of them out")


def _problem(error: ValidationError, path: Path) -> str:
    """Say which key is wrong, and why."""
    # A misspelt key is unknown, and missing under its right name: the former says more.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = _short(".".join(str(part) for part in first["loc"]))[1:-1] or "the file"
    value = _short(first["input"])
    match first["type"]:
        case "missing":
            problem = f"is missing; `git diff {path.name}` shows what changed"
        case "extra_forbidden":
            problem = f"is {value}: not a parameter; allowed here: {_keys(first['loc'][:-1])}"
        case "model_type":
            problem = f"is {value}: it should hold {_keys(first['loc'])}"
        case "bool_type":
            problem = f"is {value}: write true or false"
        case _:
            problem = f"is {value}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return f"{key} {problem}"


def _parse(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    try:
        return YAML(typ="safe").load(text)  # as DVC reads the file
    except Exception as error:  # many kinds, from 2001-99-99, 0x_, !!bool x, a thousand brackets
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        printable = "".join(character for character in problem if character.isprintable())
        raise UserError(f"{path.name}{line}: bad YAML: {printable[:200]}") from None


def _keys(section: tuple[int | str, ...]) -> str:
    model = get_type_hints(Params)[str(section[0])] if section else Params
    return ", ".join(field.alias or name for name, field in model.model_fields.items())


if __name__ == "__main__":
    run_command(load)
