"""The data set: MNIST as it lies on disk, four IDX files, uncompressed, under the names that torchvision uses.

All that the project takes as given about its data stands here: another data set needs another copy of this file.
"""

import hashlib
import math
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lineage import HERE, UserError

Split = Literal["train", "t10k"]
NAME = "MNIST"
RAW = Path("data/MNIST/raw")
SHAPE = (28, 28)  # of an image: rows, columns
CLASSES = 10
SIZES: dict[Split, int] = {"train": 60_000, "t10k": 10_000}  # images

# Of the uncompressed files. A file with another hash is not of this data set, wherever it came from.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# One digest for the whole data set, short enough for MLflow's 36 characters.
DIGEST = hashlib.sha256("".join(SHA256.values()).encode()).hexdigest()[:32]


def load(split: Split, raw: Path = HERE / RAW) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the training images or the test images.

    Returns:
        Images (N, *SHAPE), 0 for paper to 255 for ink, and their labels (N,), from 0 to CLASSES - 1.

    Raises:
        UserError: a file is missing, is not the data set's, or does not hold what this file says.
    """
    images = _verified(raw / f"{split}-images-idx3-ubyte")[16:]  # after four 32-bit numbers
    labels = _verified(raw / f"{split}-labels-idx1-ubyte")[8:]  # after two
    size = SIZES[split]
    if (len(images), len(labels)) != (size * math.prod(SHAPE), size) or labels.max() >= CLASSES:
        raise UserError(
            f"{raw}: {split} has {len(images):,} pixels, and {len(labels):,} labels up to {labels.max()}: these do "
            "not fit SIZES, SHAPE and CLASSES in mnist_mlp/recipe/data.py; correct these"
        )
    return images.reshape(size, *SHAPE), labels


def _verified(path: Path) -> NDArray[np.uint8]:
    remedy = "`dvc repro -f download` fetches it again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    if hashlib.sha256(content).hexdigest() != SHA256[path.name]:
        raise UserError(f"{path} is damaged: its SHA-256 is not that of {NAME}'s file; {remedy}")
    return np.frombuffer(bytearray(content), np.uint8)  # writable, which torch.from_numpy asks for
