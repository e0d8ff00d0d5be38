"""``params.yaml``: every number that a user may change, with its type and range.

``python -m stages.params`` checks the file, as every stage does that runs; ``make repro`` begins with it.
"""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages import StageError, run

PARAMS = Path("params.yaml")

Mirror = Annotated[str, Field(pattern=r"^(https?://|file://|npm:)\S+$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class Section(BaseModel):
    """One section: no unknown keys, no conversion between types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where MNIST comes from, and how grey levels in [0, 1] become the net's input: ``(x - mean) / std``."""

    mirrors: Annotated[list[Mirror], Field(min_length=1)]
    timeout: Annotated[float, Field(gt=0, le=86_400)]  # seconds for one file from one mirror
    mean: Fraction
    std: Annotated[float, Field(gt=0)]


class Model(Section):
    """The widths of the hidden layers, first to last."""

    hidden: list[Count]


class Train(Section):
    """The recipe: plain SGD on batches that are drawn anew each epoch."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: Count
    batch_size: Annotated[int, Field(ge=1, le=60_000)]
    lr: Annotated[float, Field(gt=0, le=1_000_000)]
    device: Literal["cpu", "cuda"]


class Evaluate(Section):
    """How the test set is read, the accuracy to reach, and whether MLflow's registry gets a model that reaches it."""

    batch_size: Annotated[int, Field(ge=1, le=10_000)]
    target_accuracy: Fraction
    register_model: Annotated[bool, Field(alias="register")]  # pydantic's models have a register of their own


class Plot(Section):
    """How the plots look."""

    dpi: Annotated[int, Field(ge=50, le=400)]
    wrong_digits: Annotated[int, Field(ge=1, le=100)]


class Params(Section):
    """The whole of ``params.yaml``; a section for each stage that has parameters."""

    data: Data
    model: Model
    train: Train
    evaluate: Evaluate
    plot: Plot

    def flat(self) -> dict[str, object]:
        """Name every parameter as DVC does: ``{"train.lr": 0.1, ...}``."""
        return {
            f"{section}.{key}": value
            for section, keys in self.model_dump(by_alias=True).items()
            for key, value in keys.items()
        }


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, as DVC reads and writes them: to YAML 1.1, which PyYAML speaks, ``1e-3`` is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = 100


def load(path: Path = PARAMS) -> Params:
    """Read and check the parameters.

    Raises:
        StageError: no such file, broken YAML, or a key that is unknown, missing, of a wrong type or out of range.
    """
    try:
        return Params.model_validate(_parse(path))
    except FileNotFoundError:
        raise StageError(f"{path}: no such file; run from the repository's root, or `git checkout {path}`") from None
    except UnicodeDecodeError:
        raise StageError(f"{path}: not a UTF-8 text file; `git checkout {path}` restores it") from None
    except ValidationError as error:
        # A misspelt key is unknown, and missing under its right name: the former says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = _short(".".join(str(part) for part in first["loc"]))[1:-1] or "the file"
        value = _short(first["input"])
        match first["type"]:
            case "missing":
                problem = f"is missing; `git diff {path}` shows what changed"
            case "extra_forbidden":
                problem = f"is {value}: not a parameter; allowed here: {_keys(first['loc'][:-1])}"
            case "model_type":
                problem = f"is {value}: it should hold {_keys(first['loc'])}"
            case _:
                problem = f"is {value}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        raise StageError(f"{path}: {key} {problem}") from None


def _parse(path: Path) -> object:
    text = path.read_text(encoding="utf-8")
    try:
        return yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise StageError(f"{path}, line {line}: not valid YAML: {error.problem or error.context}") from None
    except Exception as error:  # PyYAML lets many kinds through, from 2001-99-99, 0b_, !!bool x, a thousand brackets
        raise StageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _keys(section: tuple[int | str, ...]) -> str:
    model = get_type_hints(Params)[str(section[0])] if section else Params
    return ", ".join(field.alias or name for name, field in model.model_fields.items())


def _short(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a huge number"


if __name__ == "__main__":
    run(load)
