"""The last lines of `make repro`: are the results the committed ones, and if not, why."""

import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lineage
from mnist_mlp import params, verdict
from mnist_mlp.published import published_history
from mnist_mlp.recipe import data, exact, net
from tests import project

REPRODUCED = "reproduced: model, history, metrics and plots are the committed bytes"


@pytest.fixture
def repository(finished: Path, tmp_path: Path) -> Path:
    return project.copy(finished, tmp_path / "repository", store=False)


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    done = project.run(folder, sys.executable, "-m", "mnist_mlp.verdict", "--check", check=False)
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    done.stdout = done.stdout.replace("\n  ", " ")  # a long line goes on below
    return done


def make_other(folder: Path, path: str, content: bytes) -> None:
    """Change a result as a run with other arithmetic would, which `dvc.lock` then records."""
    before = lineage.md5((folder / path).read_bytes())
    (folder / path).write_bytes(content)
    recorded = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(recorded.replace(before, lineage.md5(content)))


def test_the_committed_bytes_are_reproduced(finished: Path) -> None:
    done = check(finished)
    assert done.stdout.endswith(f"\n{REPRODUCED}\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"of {data.SIZES['t10k']:,} images (target reached)" in done.stdout
    assert all(f"published {row['test_acc']:.4%}" in done.stdout for row in published_history()[-1:])


def test_an_edited_parameter_is_named(repository: Path) -> None:
    project.edit(repository, project.TRIED)
    make_other(repository, "results/history.csv", b"another history")
    done = check(repository)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("different: ")
    assert "results/history.csv" in lines[-2]
    ((name, value),) = project.TRIED.items()
    before = params.load().flat()[name]
    assert lines[-1] == f"likely reason: {name} is {value}, in the committed dvc.lock {before}"


def test_an_edited_code_file_is_named(repository: Path) -> None:
    with (repository / "stages/plot.py").open("a") as file:
        file.write("# edited\n")
    (repository / "results/plots/test_acc.png").write_bytes(b"another plot")
    done = check(repository)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "likely reason: stages/plot.py is edited")


def test_a_lock_that_is_not_committed_is_named(repository: Path) -> None:
    project.edit(repository, {"evaluate.target_accuracy": 0.6})
    project.run(repository, "dvc", "commit", "--force", "evaluate")
    done = check(repository)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        REPRODUCED, "dvc.lock has changed with parameters or code; commit it together with them"
    ]  # fmt: skip


@pytest.mark.recipe
def test_only_a_processor_without_fused_multiply_add_is_expected_to_give_other_bytes(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    metrics = (repository / "results/metrics.json").read_text()
    before = metrics.split('"accuracy": ')[1].split(",")[0]
    make_other(repository, "results/metrics.json", metrics.replace(before, "0.875", 1).encode())
    config = params.load(Path("params.yaml"))
    for machine, capability in (("x86_64", "AVX512"), ("aarch64", "DEFAULT")):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        lines, as_expected = verdict.compare(config)
        assert not as_expected
        assert lines[1].startswith("likely reason: unknown")
        assert f"{lineage.cpu()} ({machine})" in lines[1]

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    lines, as_expected = verdict.compare(config)
    assert as_expected
    assert lines[1].startswith("this is expected: PyTorch uses no AVX2 here")
    assert f"accuracy is 0.875, committed {before}" in lines


@pytest.mark.recipe
def test_other_versions_are_named_whether_the_bytes_differ_or_not(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    config, version = params.load(Path("params.yaml")), importlib.metadata.version
    here = f"{version('torch').partition('+')[0]}"
    assert verdict.compare(config) == ([REPRODUCED], True)
    other = {"torch": "2.9.1+cpu"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or version(name))
    named = f"torch is 2.9.1+cpu, and requirements.txt has {here}"
    assert verdict.compare(config) == ([REPRODUCED, f"though {named}"], True)
    make_other(repository, "results/history.csv", b"another history")
    assert verdict.compare(config)[0][1] == f"likely reason: {named}"


@pytest.mark.recipe
def test_an_edit_that_nobody_has_run_is_not_reproduced_and_a_frozen_stage_is_named(repository: Path) -> None:
    project.edit(repository, {"train.lr": 0.2})
    edited = f"the committed bytes, but params.yaml: train.lr is 0.2, and the results were made with {project.LR}; run "
    done = check(repository)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, f"{edited}`dvc repro`")
    project.run(repository, "dvc", "freeze", "train")
    assert check(repository).stdout.splitlines()[-1] == f"{edited}`dvc unfreeze train`, then `dvc repro`"


def test_what_decides_no_byte_is_no_reason(repository: Path) -> None:
    project.edit(repository, {"data.mirrors": ["file:///elsewhere"]})
    with (repository / "stages/download.py").open("a") as file:
        file.write("# edited\n")
    (repository / "results/plots/test_acc.png").write_bytes(b"another plot")
    done = check(repository)
    assert "likely reason: " in done.stdout
    assert not any(name in done.stdout for name in ("mirrors", "download"))
    project.edit(repository, {"plot.dpi": 90})
    assert check(repository).stdout.splitlines()[-1] == "likely reason: plot.dpi is 90, in the committed dvc.lock 100"


def test_layers_that_have_other_bytes_elsewhere_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    make_other(repository, "results/history.csv", b"another history")
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), exact.Linear(1352, 10)
    monkeypatch.setattr(net, "mlp", lambda _: nn.Sequential(*layers))
    lines, as_expected = verdict.compare(params.load(Path("params.yaml")))
    assert not as_expected
    assert lines[1].startswith("likely reason: BatchNorm2d, Conv2d: of all layers, only Linear of recipe/exact.py has")


def test_code_in_a_folder_that_nobody_has_run_is_not_reproduced(repository: Path) -> None:
    with (repository / "mnist_mlp/recipe/training.py").open("a") as file:
        file.write("# edited\n")
    line = "mnist_mlp/recipe has changed since stage download last ran; run `dvc repro`"
    done = check(repository)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, f"the committed bytes, but {line}")
    make_other(repository, "results/plots/test_acc.png", b"another plot")
    assert check(repository).stdout.splitlines()[-1] == "likely reason: mnist_mlp/recipe/training.py is edited"
    project.run(repository, "git", "commit", "--quiet", "--message", "test", "mnist_mlp")
    assert check(repository).stdout.splitlines()[-1] == (
        "likely reason: mnist_mlp/recipe is committed, but dvc.lock is of an older one; commit dvc.lock and results"
    )


def test_a_result_that_the_pipeline_has_not_made_is_named_and_the_advice_restores_it(repository: Path) -> None:
    model = repository / "results/model.safetensors"
    good = model.read_bytes()
    model.unlink()  # it may be a link into DVC's cache
    model.write_bytes(good[:1000])
    done = check(repository)
    line = "likely reason: results/model.safetensors is not what the pipeline has made here; run `dvc repro`"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, line)
    project.run(repository, "dvc", "repro", "plot")
    assert check(repository).stdout.endswith(f"\n{REPRODUCED}\n")


@pytest.mark.parametrize("content", ["<<<<<<<", "{}", "[1]", '{"accuracy": null}'])
def test_metrics_that_are_none_are_one_line(repository: Path, content: str) -> None:
    (repository / "results/metrics.json").write_text(content)
    done = check(repository)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("verdict: results/metrics.json is damaged, or in a merge; run `git checkout HEAD")


def test_a_lost_result_is_named(repository: Path) -> None:
    (repository / "results/predictions.csv").unlink()
    done = check(repository)
    line = "incomplete: results/predictions.csv missing; `dvc repro` makes what is missing"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, line)


def test_without_committed_results_it_says_how_to_keep_them(repository: Path) -> None:
    project.run(repository, "git", "rm", "--quiet", "--cached", "dvc.lock")
    project.run(repository, "git", "commit", "--quiet", "-m", "none")
    done = check(repository)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0, "no results are committed yet; `git add dvc.lock results && git commit` keeps these"
    )  # fmt: skip


def test_committed_code_is_named_if_dvc_lock_is_of_an_older_one(repository: Path) -> None:
    with (repository / "stages/plot.py").open("a") as file:
        file.write("# edited\n")
    (repository / "mnist_mlp/zahl ä.py").write_text("# read by nobody\n")
    project.commit(repository)
    (repository / "mnist_mlp/zahl ä.py").write_text("# edited\n")
    (repository / "results/plots/test_acc.png").write_bytes(b"another plot")
    assert check(repository).stdout.splitlines()[-2:] == [
        "likely reason: mnist_mlp/zahl ä.py is edited",
        "likely reason: stages/plot.py is committed, but dvc.lock is of an older one; commit dvc.lock and results",
    ]


@pytest.mark.full
def test_a_merge_with_conflicts_is_one_line_and_its_advice_ends_it(tried: Path, tmp_path: Path) -> None:
    repository = project.copy(tried, tmp_path / "repository")
    other: dict[str, object] = {"plot.dpi": 80}
    for branch, edit in (("one", other), ("two", project.TRIED)):  # the second one's results are in the cache
        project.run(repository, "git", "checkout", "--quiet", "-b", branch, "main")
        project.edit(repository, edit)
        project.run(repository, "dvc", "repro")
        if branch == "one":
            (repository / "results/metrics.json").write_text("{}\n")
        (repository / "study/dvc.lock").write_text(f"schema: '2.0'\nstages: {{}}  # {branch}\n")
        project.commit(repository)
    assert project.run(repository, "git", "merge", "one", check=False).returncode == 1
    cure = "git checkout HEAD -- '*dvc.lock' results"
    advice = f"is damaged, or in a merge; run `{cure}`, then `dvc repro`"
    done = check(repository)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"verdict: results/metrics.json {advice}\n")
    done = project.run(repository, sys.executable, "-m", "stages.track", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"track: dvc.lock or dvc.yaml {advice}\n")
    done = project.run(repository, sys.executable, "-m", "mnist_mlp.study.check", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"study-check: dvc.lock or dvc.yaml {advice}\n")

    project.run(repository, *shlex.split(cure))
    project.run(repository, "dvc", "repro")
    project.commit(repository)
    assert REPRODUCED in check(repository).stdout
    config = params.load(repository / "params.yaml").flat()
    assert {name: config[name] for name in other | project.TRIED} == other | project.TRIED


def test_git_that_fails_is_not_taken_for_a_repository_without_results(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    (repository / ".git").write_text("gitdir: nowhere\n")
    done = check(repository)
    assert done.returncode == 1
    assert done.stderr.startswith("verdict: Git fails: fatal: not a git repository: ")


def test_a_clone_has_the_same_bytes_where_git_is_set_to_convert_line_ends(finished: Path, tmp_path: Path) -> None:
    crlf = ("-c", "core.autocrlf=true")
    project.run(tmp_path, "git", *crlf, "clone", "--quiet", *crlf, str(finished), "clone")
    files = project.run(finished, "git", "ls-files").stdout.split()
    assert "requirements.txt" in files
    assert [name for name in files if (finished / name).read_bytes() != (tmp_path / "clone" / name).read_bytes()] == []
