"""A user who turns this project into another, step by step, as docs/make-it-yours.md says."""

import gzip
import hashlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mnist_mlp.recipe.history import FIGURES
from tests import project

pytestmark = [pytest.mark.full, pytest.mark.recipe]
PAGE = project.REPOSITORY / "docs/make-it-yours.md"
ROWS, COLUMNS, CLASSES = 12, 10, 4
SIZES = {"train": 900, "t10k": 700}
UNTOUCHED = (
    "test_lineage",
    "test_make",
    "test_pages",
    "test_store",
    "test_surroundings",
)  # test what the page changes nothing of

PLOT = '''def confidence(predictions: NDArray[np.void]) -> Figure:
    """Count the test images by the probability of the class that they were taken for."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    figure.subplots().hist(predictions["probability"], bins=20)
    return figure


'''


def edit(folder: Path, path: str, *edits: tuple[str, str]) -> None:
    """Replace text that is there exactly once. The page has to name the file."""
    assert path in PAGE.read_text(), f"{PAGE.name} does not name {path}"
    text = (folder / path).read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{path} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    (folder / path).write_text(text)


def between(folder: Path, path: str, start: str, end: str) -> str:
    """Read what lies between two texts, without them."""
    return (folder / path).read_text().partition(start)[2].partition(end)[0]


def draw(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make images of noise with a lighter patch, in another corner for each class; faint ones are hard to tell."""
    random = np.random.default_rng(len(split))
    labels = random.integers(0, CLASSES, SIZES[split], np.uint8)
    images = random.normal(100, 25, (SIZES[split], ROWS, COLUMNS))
    for image, label in zip(images, labels, strict=True):
        top, left = label // 2 * 6 + 1, label % 2 * 5 + 1
        image[top : top + 4, left : left + 3] += random.uniform(0, 120)
    return images.clip(0, 255).astype(np.uint8), labels


def walk(folder: Path, mirror: Path) -> None:
    """Take the steps of the page, in its order."""
    idx_code, cnn, adam, metric = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

    # 1. Other data
    definitions: dict[str, Any] = {"np": np}
    exec(idx_code, definitions)
    mirror.mkdir()
    hashes = {}
    for split in SIZES:
        for kind, array in zip(("images-idx3", "labels-idx1"), draw(split), strict=True):
            name, content = f"{split}-{kind}-ubyte", definitions["idx"](array)
            hashes[name] = hashlib.sha256(content).hexdigest()
            (mirror / f"{name}.gz").write_bytes(gzip.compress(content))
    old_hashes = between(folder, "mnist_mlp/recipe/data.py", "SHA256 = {\n", "}\n")
    edit(
        folder,
        "mnist_mlp/recipe/data.py",
        ('NAME = "MNIST"', 'NAME = "patches"'),
        ("SHAPE = (28, 28)", f"SHAPE = ({ROWS}, {COLUMNS})"),
        ("CLASSES = 10", f"CLASSES = {CLASSES}"),
        ('{"train": 60_000, "t10k": 10_000}', '{"train": 900, "t10k": 700}'),
        (old_hashes, "".join(f'    "{name}": "{digest}",\n' for name, digest in hashes.items())),
    )
    old_mirrors = between(folder, "params.yaml", "  mirrors:\n", "  timeout:")
    edit(
        folder,
        "params.yaml",
        (old_mirrors, f"  - file://{mirror}\n"),
        ("mean: 0.5", "mean: 0.4"),
        ("std: 0.5", "std: 0.2"),
        ("validation: 0", "validation: 100"),
        ("vary: {}", "vary: {data.std: [0.2, 0.3]}"),
    )

    # 2. Another net, 3. another optimiser
    old_net = between(folder, "mnist_mlp/recipe/net.py", 'little memory for it.\n    """\n', "\n\ndef normalise")
    edit(folder, "mnist_mlp/recipe/net.py", (old_net, indented(cnn)))
    project.run(folder, ".venv/bin/ruff", "check", "--fix")
    old_optimizer = between(folder, "mnist_mlp/recipe/training.py", "_set_arithmetic(config)\n", "    shuffle = ")
    new_optimizer = adam.replace("lr=config.train.lr", "lr=config.train.lr, betas=(config.train.beta, 0.999)")
    edit(folder, "mnist_mlp/recipe/training.py", (old_optimizer, indented(new_optimizer)))

    # 4. A new parameter takes the place of one that is no longer needed
    edit(folder, "params.yaml", ("  lr: 0.1\n", "  lr: 0.01\n"), ("  momentum: 0.0\n", "  beta: 0.9\n"))
    edit(
        folder,
        "mnist_mlp/recipe/params.py",
        ("    momentum: Annotated", "    beta: Annotated"),
        ('    "train.momentum"', '    "train.beta"'),
    )
    edit(folder, "study/dvc.yaml", ("    - train.momentum\n", "    - train.beta\n"))

    # 5. A new metric
    held_out = "    if config.data.validation:\n        held_out"
    edit(folder, "mnist_mlp/recipe/training.py", (held_out, indented(metric) + held_out))
    edit(folder, "stages/track.py", ('("accuracy", "validation', '("accuracy", "top3_accuracy", "validation'))

    # 6. A new plot
    call = '    plots["confidence"] = confidence(predictions)\n'
    edit(
        folder,
        "stages/plot.py",
        ("    for name, figure", f"{call}    for name, figure"),
        ("def confusion_matrix(", f"{PLOT}def confusion_matrix("),
    )
    plot = "    - results/plots/confusion_matrix.png\n"
    edit(folder, "dvc.yaml", (plot, f"    - results/plots/confidence.png:\n        cache: false\n{plot}"))

    # 8. Other names
    edit(folder, "mnist_mlp/record.py", ('EXPERIMENT = "mnist"', 'EXPERIMENT = "patches"'))
    edit(folder, "mnist_mlp/record.py", ('NAME = "mnist-mlp"', 'NAME = "patches-cnn"'))
    edit(folder, "pyproject.toml", ('name = "mnist-mlp"', 'name = "patches-cnn"'))

    # 9. No published figures
    (folder / "data/published_history.csv").unlink()
    published = "      data/published_history.csv: "
    edit(folder, "dvc.yaml", *((f"{published}{name}\n", "") for name in FIGURES))

    # 10. The target, and how tests train
    edit(
        folder,
        "params.yaml",
        ("target_accuracy: 0.977", "target_accuracy: 0.8"),
        ("seeds: 100", "seeds: 2"),
        ("epochs: 20", "epochs: 10"),
    )
    edit(
        folder,
        "tests/project.py",
        ('"train.batch_size": 250', '"train.batch_size": 50'),
        ('{"train.lr": 0.05}', '{"train.beta": 0.8}'),
    )


def indented(code: str) -> str:
    return "".join(f"    {line}" if line.strip() else line for line in code.splitlines(keepends=True))


def set_up(folder: Path) -> None:
    """Lend the folder the virtual environment that runs here, so that make has nothing to install."""
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix, name))
    (folder / ".venv/installed").write_text(f"{folder}\n")


def test_a_user_who_follows_make_it_yours_has_a_pipeline_that_is_proved_and_tested_like_this_one(
    finished: Path, tmp_path: Path
) -> None:
    folder = project.copy(finished, tmp_path / "patches")
    shutil.copy(project.REPOSITORY / "params.yaml", folder)
    set_up(folder)
    walk(folder, tmp_path / "mirror")

    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    env = project.environment(PYTEST_ADDOPTS=" ".join(f"--ignore=tests/{name}.py" for name in UNTOUCHED))
    output = project.run(folder, "bash", "-c", f"set -ex\n{commands}", env=env).stdout
    assert "patches-cnn version 1, the champion" in output
    assert "every figure and byte" in output
    assert project.run(folder, "git", "status", "--porcelain").stdout == ""
    done = project.run(folder, sys.executable, "-m", "mnist_mlp.verdict", "--check")
    assert "of 700 images (target reached)" in done.stdout
    assert "reproduced: model" in done.stdout
