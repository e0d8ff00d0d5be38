"""`make verify`: what a run recorded is run again, and is the same, or it is said what is not."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

import lineage
from lineage import UserError, proof, registry
from mnist_mlp import params, record
from mnist_mlp import verify as verification
from mnist_mlp.recipe import MODEL, data, net
from stages import track
from tests import project
from tests.conftest import Call

WEIGHTS, PROBABILITIES = "the MD5 of the stored model's weights", "the MD5 of its probabilities for the test images"
CHAMPION = f"models:/{record.NAME}@{registry.CHAMPION}"


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository to do things to."""
    return project.copy(finished, tmp_path / "repository")


class Flipped(torch.nn.Module):
    """The right weights in a wrong graph."""

    def __init__(self, classifier: net.ImageClassifier) -> None:
        super().__init__()
        self.net, self.mean, self.std = classifier.net, classifier.mean, classifier.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flipped: torch.Tensor = net.ImageClassifier.forward(self, images).flip(1)  # type: ignore[arg-type]
        return flipped


class Nudged(torch.nn.Module):
    """Other probabilities for the last test image only, and only in the last bits."""

    def __init__(self, classifier: net.ImageClassifier) -> None:
        super().__init__()
        self.net, self.mean, self.std = classifier.net, classifier.mean, classifier.std
        self.last = data.load("t10k")[0][-1].sum(dtype=int)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        probabilities = net.ImageClassifier.forward(self, images)  # type: ignore[arg-type]
        is_last = images.flatten(1).long().sum(1, keepdim=True) == int(self.last)
        return torch.where(is_last, probabilities * (1 + 1e-6), probabilities)


@pytest.mark.full
def test_a_stored_model_that_computes_something_else_is_different(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tag still names the right file."""
    project.run(repository, sys.executable, "-m", "stages.track")  # the copy is the store's place now
    monkeypatch.chdir(repository)
    (run,) = project.runs(repository)
    config = params.load(Path("params.yaml"))
    model = net.mlp(config.model.hidden)
    net.load_weights(model, MODEL.read_bytes(), "model")
    classifier = net.ImageClassifier(model, config.data.mean, config.data.std).eval()
    assert run.outputs is not None
    stored = mlflow.get_logged_model(run.outputs.model_outputs[0].model_id)
    folder = Path(stored.artifact_location.removeprefix("file://"))
    images = torch.zeros(2, *data.SHAPE, dtype=torch.uint8)

    def replace(model: torch.nn.Module) -> None:
        shutil.rmtree(folder)
        mlflow.pytorch.save_model(
            model.eval(), folder, serialization_format="pt2", input_example=images.numpy(), pip_requirements=[],
            signature=mlflow.models.infer_signature(images.numpy(), classifier(images).detach().numpy()),
        )  # fmt: skip

    right = verification.hash_model(CHAMPION)
    replace(Flipped(classifier))
    assert verification.hash_model(CHAMPION)[WEIGHTS] == right[WEIGHTS]
    mlflow.MlflowClient().set_tag(run.info.run_id, "torch", "1.0")
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.verify", CHAMPION, check=False)
    assert done.returncode == 1, done.stderr
    *_, difference, environment = done.stdout.splitlines()
    assert difference.startswith(PROBABILITIES)
    assert environment == f"torch is 1.0 in the run, {run.data.tags['torch']} here"
    assert "epoch  1" in done.stdout
    assert not any(words in done.stdout + done.stderr for words in ("champion", "dvc push", "git add"))

    replace(Nudged(classifier))
    hashes = verification.hash_model(CHAMPION)
    assert hashes[WEIGHTS] == right[WEIGHTS]
    assert hashes[PROBABILITIES] != right[PROBABILITIES]

    next(model.parameters()).data[0, 0] += 1e-6
    replace(classifier)
    assert verification.hash_model(CHAMPION)[WEIGHTS] != right[WEIGHTS]


@pytest.mark.full
def test_a_broken_store_is_no_answer_but_advice_that_works(
    repository: Path, enter: Callable[[Path], None], call: Call
) -> None:
    enter(repository)
    database = repository / "mlflow.db"
    database.write_text("It was a dark and stormy night; the rain fell in torrents.")
    reason = f"MLflow at sqlite:///{database} refuses: file is not a database"
    advice = "it is damaged: move it away (its runs are in it), and `make track` makes one of the present results"
    assert call(verification.main, CHAMPION) == (2, "", f"verify: {reason}; {advice}\n")
    with pytest.raises(UserError, match=re.escape(f"{reason}; {advice}")):
        call(track.main)
    database.rename(repository / "damaged")
    call(track.main)
    (run,) = project.runs(repository)
    assert proof.find(CHAMPION).info.run_id == run.info.run_id


@pytest.mark.full
def test_a_model_whose_files_are_lost_is_no_answer_but_advice_that_works(
    repository: Path, enter: Callable[[Path], None], call: Call
) -> None:
    enter(repository)
    call(track.main)  # the copy is the store's place now
    for folder in repository.glob("mlruns/models/*/artifacts"):
        shutil.rmtree(folder)
    reason = "No such artifact: 'MLmodel'; `make track` makes it from the results"
    status, _, errors = call(verification.main, CHAMPION)
    assert (status, errors) == (2, f"verify: MLflow has no usable {CHAMPION}: {reason}\n")
    call(track.main)
    assert verification.hash_model(CHAMPION)[WEIGHTS] == lineage.md5(MODEL.read_bytes())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], (0, r"identical: run 7, every figure and byte, run again in \d+ s\n", "")),
        (["loss is 1 in the run, 2 here"], (1, r"different: run 7\nloss is 1 in the run, 2 here\n", "")),
        (UserError("no answer"), (2, "", "verify: no answer\n")),
        (KeyError("x"), (2, "", "verify: KeyError: 'x'\n")),  # an error that nobody expects
    ],
    ids=["identical", "different", "refused", "error"],
)
def test_the_exit_status_says_what_came_of_it(
    call: Call, monkeypatch: pytest.MonkeyPatch, found: Any, expected: tuple[int, str, str]
) -> None:
    def verify_run(_: str) -> proof.Proof:
        if isinstance(found, Exception):
            raise found
        return proof.Proof("run 7", found)

    monkeypatch.setattr(verification, "verify_run", verify_run)
    status, output, errors = call(verification.main, CHAMPION)
    assert (status, errors) == (expected[0], expected[2])
    assert re.fullmatch(expected[1], output)


def test_a_run_of_the_study_is_refused(repository: Path, enter: Callable[[Path], None], call: Call) -> None:
    enter(repository)
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    run = client.create_run(client.create_experiment(record.STUDY))
    line = f"verify: run {run.info.run_id} is one of the study, whose runs `make study-check` proves\n"
    assert call(verification.main, run.info.run_id) == (2, "", line)
