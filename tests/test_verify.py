"""`make verify`: what a run recorded is run again, and is the same, or it is said what is not."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch

import lineage
from lineage import proof, registry, runs, store
from mnist_mlp import params, record
from mnist_mlp import verify as verification
from mnist_mlp.recipe import MODEL, data, net
from tests import project

WEIGHTS, PROBABILITIES = "the MD5 of the stored model's weights", "the MD5 of its probabilities for the test images"
WRONG_DIGITS = r"path: results/plots/wrong_digits.png\n *hash: md5\n *md5: (\w+)"  # in dvc.lock
CHAMPION = f"models:/{record.NAME}@{registry.CHAMPION}"


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    """A finished repository to do things to."""
    return project.copy(finished, tmp_path / "repository")


def verify(folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    return project.run(folder, sys.executable, "-m", "mnist_mlp.verify", model, check=False)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, str], str]:
    """Verify, in this process, what is refused in one line; give the line."""

    def run(folder: Path, model: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(store, "ROOT", folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setattr(sys, "argv", ["verify", model])
        with pytest.raises(SystemExit) as ended:
            verification.main()
        output = capsys.readouterr()
        assert (ended.value.code, output.out, len(output.err.splitlines())) == (2, "", 1)
        return output.err

    return run


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Read times and contents of all files; Git touches the objects that it reads."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path: (0 if "objects" in path.parts else path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_figure_that_does_not_come_out_again_is_shown_with_both_values(repository: Path) -> None:
    """And neither later commits, nor the workspace's parameters, code and results, have to do with it."""
    (run,) = project.runs(repository)
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    (true,) = (m.value for m in client.get_metric_history(run.info.run_id, "test_loss") if m.step == 1)
    client.log_metric(run.info.run_id, "test_loss", 0.123456, step=1)
    client.log_metric(run.info.run_id, "accuracy", 1.0)  # differs too, but later
    client.set_tag(run.info.run_id, "torch", "1.0")
    project.edit(repository, {"train.lr": 0.05})
    (repository / "stages/train.py").write_text("raise SystemExit")
    project.commit(repository)
    shutil.rmtree(repository / "results")

    done = verify(repository, run.info.run_id)
    assert done.returncode == 1, done.stderr
    torch = run.data.tags["torch"]
    assert done.stdout.splitlines()[-3:] == [
        f"different: run {run.info.run_id}, commit {run.data.tags['git.commit'][:10]}",
        f"epoch 1: test_loss is 0.123456 in the run, {true} here",
        f"torch is 1.0 in the run, {torch} here",
    ]


@pytest.mark.full
def test_a_run_is_proved_with_code_that_is_committed_only_after_it_and_nothing_is_touched(repository: Path) -> None:
    """Edit, run, commit: the usual order. The change is stored with the run, and so are new files."""
    (repository / "mnist_mlp/new.py").write_text("TWICE = 2.0\n")
    evaluate = repository / "stages/evaluate.py"
    evaluate.write_text(
        evaluate.read_text()
        .replace("    metrics = {\n", '    metrics = {\n        "twice": new.TWICE,\n')
        .replace("from mnist_mlp import ", "from mnist_mlp import new, ")
    )
    project.edit(repository, {"plot.dpi": 90})
    project.run(repository, "dvc", "repro")
    project.commit(repository)
    new, _ = project.runs(repository)
    before = files(repository)
    done = verify(repository, new.info.run_id)
    assert done.returncode == 0, done.stderr
    assert "epoch  1" in done.stdout
    assert not any(words in done.stdout + done.stderr for words in ("champion", "dvc push", "git add"))
    commit = new.data.tags["git.commit"]
    assert f"identical: run {new.info.run_id}, commit {commit[:10]}, every figure and byte" in done.stdout
    assert files(repository) == before

    artifacts = Path(new.info.artifact_uri.removeprefix("file://"))
    lock = artifacts / runs.LOCK[0]
    (digest,) = re.findall(WRONG_DIGITS, lock.read_text())
    lock.write_text(lock.read_text().replace(digest, "f" * 32))
    done = verify(repository, new.info.run_id)
    assert done.returncode == 1, done.stderr
    assert f"results/plots/wrong_digits.png is {'f' * 32} in the run, {digest} here" in done.stdout

    with (artifacts / runs.PATCH[0]).open("a") as patch:
        patch.write("\n")
    done = verify(repository, new.info.run_id)
    line = f"verify: run {new.info.run_id}: its {runs.PATCH[0]} is damaged\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_run_whose_code_is_unknown_is_refused(repository: Path, refusal: Callable[[Path, str], str]) -> None:
    (run,) = project.runs(repository)
    mlflow.MlflowClient().set_tag(run.info.run_id, "git.patch.md5", "unknown")
    reason = "does not know its git.patch.md5, because Git failed; `make track` makes a new run"
    assert refusal(repository, run.info.run_id) == f"verify: run {run.info.run_id} {reason}\n"


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
    done = verify(repository, CHAMPION)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-2].startswith(PROBABILITIES)

    replace(Nudged(classifier))
    hashes = verification.hash_model(CHAMPION)
    assert hashes[WEIGHTS] == right[WEIGHTS]
    assert hashes[PROBABILITIES] != right[PROBABILITIES]

    next(model.parameters()).data[0, 0] += 1e-6
    replace(classifier)
    assert verification.hash_model(CHAMPION)[WEIGHTS] != right[WEIGHTS]


@pytest.mark.full
def test_a_commit_is_proved_without_any_store(repository: Path, tmp_path: Path) -> None:
    """A reviewer's clone: nothing but Git and the data, and of the files in Git only those of the last commit."""
    clone = tmp_path / "a clone"
    project.edit(repository, {"train.lr": 0.05})
    project.commit(repository)
    project.run(repository, "git", "config", "uploadpack.allowFilter", "true")
    project.run(tmp_path, "git", "clone", "--quiet", "--filter=blob:none", f"file://{repository}", str(clone))
    shutil.copytree(repository / "data/MNIST/raw", clone / "data/MNIST/raw", dirs_exist_ok=True)
    done = verify(clone, "HEAD~")
    assert done.returncode == 0, done.stderr
    assert "every figure and byte" in done.stdout
    assert not (clone / "mlflow.db").exists()


def test_the_users_git_hooks_do_not_run_in_the_clone_that_proves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text(f"[core]\n\thooksPath = {tmp_path}\n")
    (tmp_path / "post-checkout").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "post-checkout").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(project.REPOSITORY)
    assert (proof._clone("HEAD", tmp_path, []) / "dvc.yaml").exists()


def test_a_commit_whose_file_does_not_come_out_again_is_different(finished: Path, repository: Path) -> None:
    """Its stages copy results that are there already, which is quick."""
    pipeline, lock = repository / "dvc.yaml", repository / "dvc.lock"
    copies = f"cmd: rm -rf results && cp -r {finished}/results ."
    pipeline.write_text(re.sub(r"cmd: python -m stages\.(train|evaluate|plot)", copies, pipeline.read_text()))
    (digest,) = re.findall(WRONG_DIGITS, lock.read_text())
    lock.write_text(lock.read_text().replace(digest, "f" * 32))
    project.commit(repository)
    project.edit(repository, {"train.lr": 0.05})
    project.commit(repository)
    done = verify(repository, "HEAD~")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == f"results/plots/wrong_digits.png is {'f' * 32} in dvc.lock, {digest} here"
    done = verify(repository, "HEAD~2~1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_every_stage_is_run_again_and_compared(finished: Path, repository: Path) -> None:
    """Also one on which no other depends. Those from the commit copy results, which is quick."""
    pipeline = repository / "dvc.yaml"
    copies = f"cmd: rm -rf results && cp -r {finished}/results ."
    text = re.sub(r"cmd: python -m stages\.(train|evaluate|plot)", copies, pipeline.read_text())
    own = (
        "  own:\n    cmd: date +%N > own.txt\n    deps: [results/metrics.json]\n    outs: [own.txt: {cache: false}]\n\n"
    )
    pipeline.write_text(text.replace("  track:\n", f"{own}  track:\n"))
    project.run(repository, "dvc", "repro", "own")
    project.commit(repository)
    done = verify(repository, "HEAD")
    assert done.returncode == 1, done.stderr
    assert re.match(r"own.txt is \w{32} in dvc.lock, \w{32} here$", done.stdout.splitlines()[-1])


def test_a_result_that_only_one_side_has_is_a_difference() -> None:
    first_difference = proof._first_difference
    assert first_difference({"a": "1"}, {"a": "1", "b": "2"}, "in dvc.lock") == ["b is missing in dvc.lock, 2 here"]
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}, "in dvc.lock") == ["b is 2 in dvc.lock, missing here"]


def test_a_commit_with_other_results_in_git_than_in_dvc_lock_is_different(repository: Path) -> None:
    metrics = repository / "results/metrics.json"
    metrics.write_text(re.sub(r'"accuracy": [0-9.]+', '"accuracy": 0.9999', metrics.read_text()))
    project.commit(repository)
    done = verify(repository, "HEAD")
    assert done.returncode == 1
    assert re.match(r"different: commit \w+\nresults/metrics.json is \w+ in Git, \w+ in dvc.lock\n$", done.stdout)


@pytest.mark.full
def test_a_broken_store_is_no_answer_but_advice_that_works(repository: Path) -> None:
    database = repository / "mlflow.db"
    database.write_text("It was a dark and stormy night; the rain fell in torrents.")
    done = verify(repository, CHAMPION)
    reason = f"MLflow at sqlite:///{database} refuses: file is not a database"
    advice = "it is damaged: move it away (its runs are in it), and `make track` makes one of the present results"
    line = f"verify: {reason}; {advice}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    done = project.run(repository, sys.executable, "-m", "stages.track", check=False)
    assert (done.returncode, done.stderr) == (1, line.replace("verify", "track"))
    database.rename(repository / "damaged")
    project.run(repository, sys.executable, "-m", "stages.track")
    (run,) = project.runs(repository)
    assert proof.find(CHAMPION).info.run_id == run.info.run_id


def test_an_error_that_nobody_expects_is_no_answer_and_named(
    repository: Path, refusal: Callable[[Path, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 would mean 'different'; and the text of a KeyError says little."""
    monkeypatch.setattr(verification, "verify_run", {}.__getitem__)
    assert refusal(repository, CHAMPION) == f"verify: KeyError: '{CHAMPION}'\n"


@pytest.mark.full
def test_a_model_whose_files_are_lost_is_no_answer_but_advice_that_works(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run(repository, sys.executable, "-m", "stages.track")  # the copy is the store's place now
    for folder in repository.glob("mlruns/models/*/artifacts"):
        shutil.rmtree(folder)
    done = verify(repository, CHAMPION)
    reason = "its files are lost, damaged or unsafe (No such artifact: 'MLmodel')"
    line = f"verify: {CHAMPION}: {reason}; `make track` replaces lost ones from the results\n"
    assert (done.returncode, done.stderr) == (2, line)
    project.run(repository, sys.executable, "-m", "stages.track")
    monkeypatch.chdir(repository)
    mlflow.set_tracking_uri(f"sqlite:///{repository}/mlflow.db")
    assert verification.hash_model(CHAMPION)[WEIGHTS] == lineage.md5(MODEL.read_bytes())


@pytest.mark.full
def test_a_run_whose_files_are_lost_is_no_answer_but_advice_that_works(repository: Path) -> None:
    project.run(repository, sys.executable, "-m", "stages.track")  # the copy is the store's place now
    (lost,) = project.runs(repository)
    shutil.rmtree(repository / "mlruns")
    done = verify(repository, CHAMPION)
    line = f"verify: the files of run {lost.info.run_id} are lost; `make track` makes a run of the present results\n"
    assert (done.returncode, done.stderr) == (2, line)
    project.run(repository, sys.executable, "-m", "stages.track")
    (new,) = project.runs(repository)
    assert proof.find(CHAMPION).info.run_id == new.info.run_id == lost.info.run_id
    assert {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(new.info.run_id)} >= {runs.LOCK[0]}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            "0123456789abcdef0123456789abcdef",
            "Run with id=0123456789abcdef0123456789abcdef not found; `make track` makes a run of the present results",
        ),
        (f"models:/{record.NAME}@nobody", "alias nobody not found"),
        (
            f"models:/{record.NAME}",
            "accepted are models:/NAME@ALIAS, models:/NAME/VERSION, the id of an MLflow run, or a Git",
        ),
        (
            "nonsense",
            "accepted are models:/NAME@ALIAS, models:/NAME/VERSION, the id of an MLflow run, or a Git revision",
        ),
    ],
)
def test_an_unknown_model_is_refused_in_one_line(
    finished: Path, model: str, reason: str, refusal: Callable[[Path, str], str]
) -> None:
    assert reason in refusal(finished, model)


def test_a_commit_without_results_is_refused(repository: Path, refusal: Callable[[Path, str], str]) -> None:
    found = project.run(repository, "git", "rev-list", "--max-parents=0", "HEAD").stdout[:10]
    line = f"verify: commit {found} has no dvc.lock with results\n"
    assert refusal(repository, found) == line


def test_a_run_of_the_study_is_refused(repository: Path, refusal: Callable[[Path, str], str]) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    run = client.create_run(client.create_experiment(record.STUDY))
    line = f"verify: run {run.info.run_id} is one of the study, whose runs `make study-check` proves\n"
    assert refusal(repository, run.info.run_id) == line


def test_a_commit_of_another_repository_is_refused(repository: Path, refusal: Callable[[Path, str], str]) -> None:
    (run,) = project.runs(repository)
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    client.set_tag(run.info.run_id, "git.commit", "0" * 40)
    line = refusal(repository, CHAMPION)
    assert f"commit {'0' * 40}, which is not in this repository; try `git fetch`, or `make track` for a" in line


def test_without_a_store_none_is_made(repository: Path, refusal: Callable[[Path, str], str]) -> None:
    (repository / "mlflow.db").unlink()
    shutil.rmtree(repository / "mlruns")
    assert "there is no MLflow store" in refusal(repository, CHAMPION)
    assert not (repository / "mlflow.db").exists()
    assert not (repository / "mlruns").exists()
