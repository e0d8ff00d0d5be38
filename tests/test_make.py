"""The Makefile outside the good case. Small shell scripts play Python and uv, so that no test sets up gigabytes."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# It makes a .venv with a pip that does nothing, and with the uv below.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv")
    {sys.executable} -m venv --without-pip .venv && cp ../uv .venv/bin
    touch "$(echo .venv/lib/*/site-packages)/pip.py" ;;
*) exec {sys.executable} "$@" ;;
esac
"""
# It fails while there is a file named "broken". A file named "meanwhile" is a script that it runs once.
UV = """#!/bin/sh
echo "uv installs from ${UV_DEFAULT_INDEX:-the usual index}"
test ! -e meanwhile || { mv meanwhile .venv && . .venv/meanwhile; }
test ! -e broken
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that ``make`` needs, outside Git."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name, script in {"python": PYTHON, "uv": UV}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return folder


def run(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    # make's own variables: these tests may run below `make test`
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    # In a session of its own, all of which a test may kill.
    env |= {"GIT_CEILING_DIRECTORIES": str(folder.parents[1])} | more
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, start_new_session=True)


def make(folder: Path, goal: str, python: str = "../python") -> subprocess.CompletedProcess[str]:
    return run(folder, "make", "--no-print-directory", goal, f"PYTHON={python}")


def message(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr beside make's own."""
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("make"))
    return line


@pytest.mark.parametrize("inside_another", [False, True], ids=["no-clone", "inside-another-clone"])
def test_an_archive_is_refused_before_the_set_up_and_the_advice_helps(folder: Path, inside_another: bool) -> None:
    if inside_another:
        run(folder.parent, "git", "init")
        run(folder.parent, "git", "commit", "--allow-empty", "-m", "another")
    for goal in ("repro", "verify", "test", "track"):
        refused = make(folder, goal)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "not a Git clone of its own" in message(refused)
    assert not (folder / ".venv").exists()

    advice = message(refused).partition("or type: ")[2]
    assert run(folder, "sh", "-c", advice).returncode == 0
    assert make(folder, "clone").returncode == 0


def test_a_clone_that_git_refuses_is_not_taken_for_an_archive(folder: Path) -> None:
    """Git says itself what is wrong, such as the folder's owner, and what to do."""
    (folder / ".git").write_text("gitdir: nowhere\n")
    refused = make(folder, "repro")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message(refused).startswith("fatal: not a git repository: ")


def test_repro_and_study_check_the_parameters_first_and_complete_mlflow_and_options_are_passed_on(folder: Path) -> None:
    run(folder, "git", "init")
    run(folder, "git", "commit", "--allow-empty", "-m", "first")
    assert make(folder, "setup").returncode == 0
    done = run(
        folder, "make", "-n", "repro", "verify", "study", "study-check", "serve", "MODEL=HEAD", "RUNS=7", "PORT=80"
    )
    steps = [line.removeprefix(".venv/bin/") for line in done.stdout.splitlines() if line.startswith(".venv/bin/")]
    assert steps == [
        "python -m mnist_mlp.params", "dvc repro", "python -m stages.track --news", "python -m mnist_mlp.verdict",
        "python -m mnist_mlp.verify 'HEAD'",
        "python -m mnist_mlp.params", "dvc repro study/dvc.yaml", "python -m mnist_mlp.study.record",
        "python -m mnist_mlp.study.check --runs '7'", "python -m mnist_mlp.serve --port '80'",
    ]  # fmt: skip


def test_a_python_that_is_too_old_is_one_line_and_leaves_no_venv(folder: Path) -> None:
    refused = make(folder, "setup", python="false")
    assert refused.returncode == 2
    assert "'false' is not Python 3.11 or newer" in message(refused)
    assert not (folder / ".venv").exists()


def test_the_next_make_begins_an_interrupted_set_up_again(folder: Path) -> None:
    (folder / "broken").touch()
    assert make(folder, "setup").returncode == 2
    (folder / ".venv/half").touch()
    (folder / "broken").unlink()
    assert "uv installs" in make(folder, "setup").stdout
    assert not (folder / ".venv/half").exists()
    assert "uv installs" not in make(folder, "setup").stdout


def test_a_moved_folder_gets_a_new_venv_and_one_line_says_why(folder: Path) -> None:
    assert make(folder, "setup").returncode == 0
    moved = folder.rename(folder.with_name("moved folder"))
    (moved / ".venv/old").touch()
    done = make(moved, "setup")
    assert done.stdout.splitlines()[0] == f"The .venv here was made in {folder.resolve()}, and works only there."
    assert "uv installs" in done.stdout
    assert not (moved / ".venv/old").exists()
    assert "uv installs" not in make(moved, "setup").stdout


def test_new_requirements_are_installed_into_the_same_venv(folder: Path) -> None:
    assert make(folder, "setup").returncode == 0
    (folder / ".venv/old").touch()
    os.utime(folder / ".venv/installed", (0, 0))  # older than requirements.txt
    assert "uv installs" in make(folder, "setup").stdout
    assert (folder / ".venv/old").exists()


def test_a_second_set_up_beside_the_first_is_refused_in_one_line_and_leaves_it_alone(folder: Path) -> None:
    (folder / "meanwhile").write_text("env -u MAKEFLAGS -u MAKELEVEL make setup PYTHON=../python 2> second\n")
    first = make(folder, "setup")
    assert (first.returncode, first.stderr) == (0, "")
    announced, installed = first.stdout.splitlines()
    assert announced.endswith("Then Python compiles it all in silence, for about a minute.")
    assert installed.startswith("uv installs")
    line, _ = (folder / "second").read_text().splitlines()  # and make's own
    assert line == "Another make sets up .venv. Wait until it has finished, then type this again."


def test_a_killed_set_up_stops_no_later_one(folder: Path) -> None:
    (folder / "meanwhile").write_text("kill -9 0\n")
    assert make(folder, "setup").returncode == -signal.SIGKILL
    assert (folder / ".venv/bin/python").exists()
    assert make(folder, "setup").returncode == 0


def test_what_starts_from_the_venv_without_activation_finds_the_project_and_its_python(
    folder: Path, tmp_path: Path
) -> None:
    """As with cron, an IDE or a notebook. `python -m` still prefers the working folder, as DVC's experiments need."""
    assert make(folder, "setup").returncode == 0
    python = folder / ".venv/bin/python"
    (folder / "here.py").write_text("print('of the project')\n")
    (tmp_path / "here.py").write_text("print('of the working folder')\n")
    script = "import here, os; print(os.environ['PATH'], os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    for path in ("/usr/bin", f"{python.parent}:/usr/bin"):
        done = run(tmp_path, str(python), "-c", script, PATH=path, PYTHONSAFEPATH="1", MLFLOW_DISABLE_TELEMETRY="")
        assert done.stdout == f"of the project\n{python.parent}:/usr/bin true\n"
    assert run(tmp_path, str(python), "-m", "here").stdout == "of the working folder\n"


@pytest.mark.full
def test_the_set_up_obeys_pips_settings_but_for_the_place_and_tells_uv_the_index(folder: Path, tmp_path: Path) -> None:
    """With a real pip, and a registry that has nothing but a package named uv."""
    index = tmp_path / "index/uv"
    index.mkdir(parents=True)
    wheel = index / "uv-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(tmp_path / "uv", "uv-1.data/scripts/uv")
        file.writestr("uv-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 1\n")
        file.writestr("uv-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("uv-1.dist-info/RECORD", "")
    (index / "index.html").write_text(f"<a href={wheel.name}>{wheel.name}</a>")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "requirements.txt").write_text(f"uv==1 --hash=sha256:{digest}\n    # via nothing\n")
    elsewhere = tmp_path / "elsewhere"
    uri = index.parent.as_uri()
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {uri}\nuser = true\ntarget = {elsewhere}\nprefix = {elsewhere}\n"
    )
    settings = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_USER": "1", "PIP_TARGET": str(elsewhere)}
    done = run(folder, "make", "setup", f"PYTHON={sys.executable}", **settings)
    assert done.returncode == 0, done.stderr
    assert f"uv installs from {uri}\n" in done.stdout
    assert not elsewhere.exists()
    os.utime(folder / ".venv/installed", (0, 0))
    again = run(folder, "make", "setup", UV_DEFAULT_INDEX="https://mine", **settings)
    assert "uv installs from https://mine\n" in again.stdout


@pytest.mark.parametrize(("of_pytest", "of_make"), [(0, 0), (5, 0), (1, 2)])  # 5: no test is selected
def test_the_long_tests_may_be_none_but_must_not_fail(folder: Path, of_pytest: int, of_make: int) -> None:
    run(folder, "git", "init")
    run(folder, "git", "commit", "--allow-empty", "-m", "first")
    (folder / "pytest.py").write_text(f"import sys; print(sys.argv[1:]); sys.exit({of_pytest})\n")
    done = run(folder, "make", "test-full", "PYTHON=../python", "WITHOUT=recipe")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (of_make, "['-m', 'full and not recipe']")


def test_the_users_git_settings_do_not_reach_the_repositories_of_tests(tmp_path: Path) -> None:
    """Nor do the variables of a Git hook that runs the tests."""
    settings = tmp_path / "gitconfig"
    settings.write_text("[commit]\n\tgpgsign = true\n[user]\n\tsigningkey = none\n")
    script = (
        "import pathlib; from tests import project; folder = pathlib.Path('made'); folder.mkdir();"
        "project.run(folder, 'git', 'init'); project.run(folder, 'touch', 'file'); project.commit(folder)"
    )
    environment = {"PYTHONPATH": str(ROOT), "GIT_CONFIG_GLOBAL": str(settings), "GIT_DIR": "nowhere"}
    done = run(tmp_path, sys.executable, "-c", script, **environment)
    assert (done.returncode, done.stderr) == (0, "")
