"""README and docs: short, without dead links, with the figures of the results and commands that work when pasted."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from mnist_mlp.recipe import METRICS
from mnist_mlp.study import plan, words
from tests import loopback, project

pytestmark = pytest.mark.recipe  # a project of one's own has pages of its own

ROOT = project.REPOSITORY
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
EDITED = "experiments.md"  # begins when the reader has edited params.yaml
WALKED = "make-it-yours.md"  # test_make_it_yours.py runs its commands, after the edits that it asks for

# Commands that the test does not run, and why.
NOT_RUN = {
    "make test": "would run this test",
    "make test WITHOUT=recipe": "would run the other tests again",
    "make verify": "make-it-yours.md runs it",
    "make verify MODEL=HEAD": "origin.md proves HEAD, by the command that this starts",
    "make study-check": "study.md runs it with RUNS=2, which is the default",
    "dvc exp run --queue -S 'train.lr=0.05,0.1' -S 'train.seed=1,2'": "test_experiments.py runs a queue",
    "dvc exp run --run-all --jobs 4": "likewise",
    "make lock": "takes whatever the package registry has that day",
    "make bench": "measures for minutes",
    "python -m tests.benchmark_study": "measures for minutes",
    "python -m tests.benchmark_serving": "needs wrk",
    "mlflow ui": "waits for a browser",
    "git merge wider": "has no conflict here; the next command needs one",
    "git checkout HEAD -- '*dvc.lock' results": "ends a merge, which a test of the verdict does",
    "git commit --no-edit": "ends a merge, likewise",
    "dask scheduler --host 10.0.0.1 --port 8786": "another machine",
    "dask worker tcp://10.0.0.1:8786 --nthreads 1 --nworkers auto": "another machine",
    "DASK_SCHEDULER_ADDRESS=tcp://10.0.0.1:8786 make study": "another machine",
    "export MLFLOW_TRACKING_URI=http://HOST:5000": "another machine",
    "mlflow server --port 5000 --backend-store-uri postgresql://USER@DBHOST/mlflow --artifacts-destination /srv/mlflow":
        "another machine",
    "uv pip install 'dvc[s3]'": "changes the virtual environment",
    "pip install uv": "changes the virtual environment",
    "uv pip install --requirements pyproject.toml": "changes the virtual environment",
    "dvc remote add --local --default store s3://BUCKET/mnist": "S3",
}  # fmt: skip


def blocks(page: str, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a page, one line a command."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [re.sub(r" \\\n +", " ", block) for block in found]


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_700_words() -> None:
    assert len(PAGES["README.md"].split()) <= 700


@pytest.mark.parametrize("name", PAGES)
def test_no_code_block_is_wider_than_90_characters(name: str) -> None:
    widths = [len(line) for block in re.findall(r"^```.*?^```$", PAGES[name], re.MULTILINE | re.DOTALL)
              for line in block.splitlines()]  # fmt: skip
    assert max(widths, default=0) <= 90


@pytest.mark.parametrize("name", PAGES)
def test_every_link_to_a_file_or_a_heading_leads_there(name: str) -> None:
    folder = ROOT if name == "README.md" else ROOT / "docs"
    text = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (folder / path).exists(), link
        assert not anchor or anchor in anchors(PAGES[Path(path or name).name]), link


def test_the_figures_of_the_pages_are_those_of_the_results() -> None:
    summary = json.loads((ROOT / plan.SUMMARY).read_text())
    (found,) = summary["settings"]
    metrics = json.loads((ROOT / METRICS).read_text())
    table = [line for line in words.in_words(summary).splitlines() if line.startswith("|")]
    assert "\n".join(table) in PAGES["study.md"]
    medians = [100 * median for median in (found["last_epoch"]["test_acc"]["median"], found["accuracy"]["median"])]
    for text in (
        f"{metrics['accuracy']:.2%} of 10,000 images",
        f"mean of batches {metrics['batch_mean_accuracy']:.4%}, published",
        f"{found['target']['reached']} runs reach {100 * found['target']['accuracy']:.1f} %",
        "The median is {:.2f} % over batches, and {:.2f} % exactly counted".format(*medians),
    ):
        assert text in PAGES["README.md"]
    trained = plan.read(*((ROOT / path).read_text() for path in (plan.RUNS, plan.HISTORY)))
    ((seed, epoch),) = ((row["seed"], len(run.history) + 1) for row, run in trained if not run.metrics)
    low, high = (100 * bound for bound in found["target"]["interval"])
    for text in (
        f"in {found['target']['reached']} of {found['runs']} runs (95 % interval of the share: ",
        f"{low:.2f} % to {high:.2f} %)",
        f"the lowest is at {100 * found['accuracy']['min']:.2f} %, and one, seed {seed}, diverged",
        f"diverged in its {epoch}th epoch",
        f"above {found['last_epoch']['test_acc']['percentile']:.0f} % of the runs",
        f"It has {100 * metrics['accuracy']:.2f} % of the test images right, exactly counted, and "
        f"{100 * metrics['batch_mean_accuracy']:.4f} % as a mean over batches",
    ):
        assert text in PAGES["study.md"]


def test_each_promise_in_the_table_has_quick_tests() -> None:
    rows = re.findall(r"^\| .+ \| `(test_\w+\.py)`: (.+) \|$", PAGES["architecture.md"], re.MULTILINE)
    assert len(rows) > 10
    for file, names in rows:
        blocks = (ROOT / "tests" / file).read_text().split("\n\n\n")
        for name in re.findall(r"`(\w+)`", names):
            (block,) = (block for block in blocks if f"\ndef {name}(" in f"\n{block}")
            assert not re.search(r"^@(full|pytest\.mark\.full)$", block, re.MULTILINE), name


def test_every_command_that_is_not_run_stands_in_a_page() -> None:
    commands = {line for page in PAGES.values() for block in blocks(page, "sh") for line in block.splitlines()}
    assert commands >= NOT_RUN.keys()


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in PAGES if blocks(PAGES[name], "sh") and name != WALKED])
def test_the_commands_of_a_page_work_when_pasted_from_top_to_bottom(name: str, tried: Path, tmp_path: Path) -> None:
    folder = project.copy(tried, tmp_path / "repository")
    project.edit(folder, {"study.seeds": 2})  # instead of a hundred
    project.commit(folder)
    if name == EDITED:
        project.edit(folder, project.TRIED)
    venv = folder / ".venv"  # as `make setup` leaves it, without gigabytes
    venv.mkdir()
    for part in Path(sys.prefix).iterdir():
        (venv / part.name).symlink_to(part)
    (venv / "installed").unlink(missing_ok=True)
    (venv / "installed").write_text(f"{folder.resolve()}\n")

    port, run = loopback.free_port(), project.runs(folder)[0]
    values = {":5001": f":{port}", "git checkout COMMIT": f"git checkout {run.data.tags['git.commit']}",
              "RUN_ID": run.info.run_id}  # fmt: skip
    script = ["set -ex", "exec < <(yes)"]  # `dvc gc` asks
    for command in "".join(blocks(PAGES[name], "sh")).splitlines():
        if command == "make serve":  # in another terminal
            answer = f"curl --silent --retry 100 --retry-delay 1 --retry-connrefused http://127.0.0.1:{port}/health"
            script += [f"{command} &", 'trap "kill $!; wait $! || true" EXIT', answer]
        elif command not in NOT_RUN:
            for placeholder, value in values.items():
                command = command.replace(placeholder, value)
            script.append(command)
    paths = [path for path in os.environ["PATH"].split(os.pathsep) if Path(path) != project.BIN]  # not activated
    env = project.environment(PATH=os.pathsep.join(paths), BROWSER="true", PORT=str(port))
    project.run(folder, "bash", "-c", "\n".join(script), env=env)
