"""A store that an earlier state of this project has filled: runs and versions are still found, served and proved."""

import sys
from pathlib import Path

import mlflow
import pytest
from PIL import Image

from mnist_mlp import record
from mnist_mlp.recipe import data
from tests import project

pytestmark = [pytest.mark.full, pytest.mark.recipe]
EARLIER = "1258dda"  # a commit of this repository, before `train.threads` was a parameter


def test_the_runs_and_versions_of_an_earlier_state_are_found_served_and_proved(mnist: Path, tmp_path: Path) -> None:
    earlier, folder = tmp_path / "earlier", tmp_path / "repository"
    if project.run(project.REPOSITORY, "git", "cat-file", "-e", f"{EARLIER}^{{commit}}", check=False).returncode:
        pytest.skip(f"this clone has no commit {EARLIER}; `git fetch --unshallow` brings it")
    project.run(tmp_path, "git", "clone", "--quiet", str(project.REPOSITORY), str(earlier))
    project.run(earlier, "git", "checkout", "--quiet", "--detach", EARLIER)
    folder.mkdir()
    project.make(folder, mnist, source=earlier)
    project.run(folder, "dvc", "repro")
    project.commit(folder)
    (old,) = project.runs(folder)

    project.put_files(folder, project.REPOSITORY)
    project.edit(folder, project.SMALL)
    project.commit(folder)
    project.run(folder, "dvc", "repro")
    project.commit(folder)
    new, *others = project.runs(folder)
    assert [run.to_dictionary() for run in others] == [old.to_dictionary()]
    assert new.data.tags["model.md5"] != old.data.tags["model.md5"]  # its sums were not exact
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{record.NAME}'")
    assert {version.run_id for version in versions} == {old.info.run_id, new.info.run_id}
    (version,) = [version for version in versions if version.run_id == old.info.run_id]

    for model in (old.info.run_id, f"models:/{record.NAME}/{version.version}"):
        done = project.run(folder, sys.executable, "-m", "mnist_mlp.verify", model)
        assert f"identical: run {old.info.run_id}" in done.stdout
    Image.fromarray(255 - data.load("t10k")[0][0]).resize((300, 300)).save(folder / "seven.png")
    assert ": 7, " in project.run(folder, sys.executable, "-m", "mnist_mlp.predict", "seven.png").stdout
