"""What ``params.yaml`` may hold, and what the user is told where it holds something else."""

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lineage import UserError
from mnist_mlp import params
from mnist_mlp.recipe import data
from tests import project

ROOT = Path(__file__).parents[1]
GOOD = (ROOT / params.PARAMS).read_text(encoding="utf-8")


def edited(key: str, value: str) -> str:
    """The repository's own file, in which ``key`` has this value, written in this way."""
    text, edits = re.subn(rf"^(  {key}:).*(\n  - .*)*", lambda match: f"{match[1]} {value}", GOOD, flags=re.MULTILINE)
    assert edits == 1
    return text


SECTIONS = ", ".join(params.Params.model_fields)


def load(tmp_path: Path, content: str | bytes) -> params.Params:
    path = tmp_path / "params.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return params.load(path)


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("override", "removed", "added"),
    [
        ("train.lr=0.05", ["  lr: 0.1"], ["  lr: 0.05"]),
        ("model.hidden=[300,100]", ["  - 400", "  - 200"], ["  - 300"]),
        ("model.hidden=[]", ["  hidden:", "  - 400", "  - 200", "  - 100"], ["  hidden: []"]),
    ],
)
def test_set_param_changes_no_line_but_those_of_the_value(
    override: str, removed: list[str], added: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(GOOD)
    apply_overrides(path, [override])  # all that `dvc exp run --set-param` does to the file
    difference = list(difflib.ndiff(GOOD.splitlines(), path.read_text().splitlines()))
    assert [line[2:] for line in difference if line.startswith("- ")] == removed
    assert [line[2:] for line in difference if line.startswith("+ ")] == added
    params.load(path)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0E-03", ".1e-2"])
def test_numbers_are_read_as_dvc_reads_them(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, edited("lr", text)).train.lr == 0.001


def test_every_parameter_goes_by_the_name_that_dvc_has_for_it(tmp_path: Path) -> None:
    flat = load(tmp_path, edited("hidden", "[7]")).flat()
    assert flat["model.hidden"] == [7]
    assert {"train.seed", "train.epochs", "train.batch_size", "train.lr", "data.mirrors", "data.mean"} <= flat.keys()
    assert all(f"{key.split('.')[1]}:" in GOOD for key in flat)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (edited("lr", ".nan"), ["train.lr", "nan", "finite"]),
        (edited("lr", ".inf"), ["train.lr", "inf", "finite"]),
        (edited("lr", "true"), ["train.lr", "True", "number"]),
        (edited("lr", '"0.1"'), ["train.lr", "'0.1'", "number"]),
        (edited("lr", "0"), ["train.lr", "0", "greater than 0"]),
        (edited("lr", "1e39"), ["train.lr", "1e+39", "less than"]),
        (edited("lr", ""), ["train.lr", "None", "number"]),
        (edited("epochs", "2.5"), ["train.epochs", "2.5", "integer"]),
        (edited("epochs", "0"), ["train.epochs", "0", "greater than or equal to 1"]),
        (edited("seed", "-1"), ["train.seed", "-1", "greater than or equal to 0"]),
        (edited("seed", "9" * 4000), ["train.seed", "999", "less than 9223372036854775808"]),
        (edited("seed", "0x" + 5000 * "f"), ["train.seed", "digits", "less than 9223372036854775808"]),
        (edited("seed", "1:30"), ["train.seed", "'1:30'", "integer"]),
        (edited("register", "yes"), ["evaluate.register", "'yes'", "true or false"]),
        (edited("lr", "0.1\n  lr: 0.2"), ["line", '"lr"', "duplicate", "0.1", "0.2"]),
        (edited("lr", '0.1\n  "\\e[31m": 1\n  "\\e[31m": ' + 5000 * "x"), ["line", "duplicate"]),
        (edited("lr", "!!python/name:os.system"), ["line", "python/name:os.system"]),
        (edited("hidden", "[400, 0]"), ["model.hidden.1", "0", "greater than or equal to 1"]),
        (edited("hidden", "400"), ["model.hidden", "400", "list"]),
        (edited("dpi", "0"), ["plot.dpi", "0", "greater than or equal to 50"]),
        (edited("wrong_digits", "0"), ["plot.wrong_digits", "0", "greater than or equal to 1"]),
        (edited("validation", str(data.SIZES["train"])), ["data.validation", f"less than {data.SIZES['train']}"]),
        (edited("std", "0"), ["data.std", "0", "greater than 0"]),
        (edited("threads", "0"), ["train.threads", "0", "greater than or equal to 1"]),
        (edited("mirrors", "[]"), ["data.mirrors", "[]", "at least 1 item"]),
        (edited("device", "tpu"), ["train.device", "'tpu'", "'cpu' or 'cuda'"]),
        (edited("mirrors", "\n    - ftp://example.org"), ["data.mirrors.0", "ftp://example.org", "https"]),
        (edited("timeout", "1e300"), ["data.timeout", "1e+300", "less than"]),
        (edited("lr", "0.1\n  nesterov: true"), ["train.nesterov", "True", "seed, epochs, batch_size, lr"]),
        (edited("lr", "0.1\n  7: 0.9"), ["train.7", "string"]),
        (
            edited("lr", "0.1").replace("  lr:", "  learning_rate:"),
            ["train.learning_rate", "0.1", "seed, epochs, batch_size, lr"],
        ),
        (GOOD.replace("  register:", "  registr:"), ["evaluate.registr", "target_accuracy, register"]),
        (GOOD + "\nserve: {port: 80}\n", ["serve", "80", SECTIONS]),
        (GOOD + '\n"two\\nlines": 1\n', ["two\\nlines", "1", SECTIONS]),
        (GOOD.partition("\nplot:")[0], ["plot", "missing"]),
        (GOOD.partition("\nplot:")[0] + "\nplot:\n", ["plot", "None", "dpi, wrong_digits"]),
        ("", ["None", SECTIONS]),
        ("- train\n- plot\n", ["['train', 'plot']", SECTIONS]),
        ("train:\n\tlr: 0.1\n", ["line 2", "YAML", r"\t"]),
        (edited("hidden", "[400, 200"), ["line", "YAML"]),
        ("\x07", ["YAML", "#x0007"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff", ["UTF-8"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_key_value_and_what_is_allowed(
    content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    text = str(caught.value).removeprefix(str(tmp_path))
    assert text.isprintable()
    assert len(text) < 250
    assert [word for word in words if word not in text] == []


def test_a_missing_file_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: no such file; `git checkout params\.yaml` restores it"):
        params.load(tmp_path / "params.yaml")


scalars = st.from_regex(r"[-+]?[0-9_.:]{1,5}([eE][-+]?[0-9]{1,2})?|0[box][0-9]{1,3}", fullmatch=True) | st.sampled_from(
    [
        "yes",
        "off",
        "on",
        "y",
        "True",
        "TRUE",
        "!!bool yes",
        "!!int 010",
        "!!float 1",
        ".inf",
        "~",
        "cuda",
        "'cpu'",
        "no",
    ]
)


@settings(deadline=None)
@given(
    key=st.sampled_from(["timeout", "std", "hidden", "seed", "epochs", "lr", "device", "register", "dpi"]), text=scalars
)
@example(key="seed", text="010")
@example(key="seed", text="0o10")
@example(key="lr", text="1e-3")
@example(key="lr", text="1_0.5")
@example(key="std", text="9007199254740993")
@example(key="register", text="yes")
def test_what_is_accepted_is_one_value_to_the_stages_and_to_dvc(
    key: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = edited(key, f"[{text}]" if key == "hidden" else text)
    folder = tmp_path_factory.getbasetemp()
    try:
        ours = load(folder, content).flat()
    except UserError:
        return
    dvc = {f"{section}.{k}": v for section, keys in load_yaml(folder / "params.yaml").items() for k, v in keys.items()}
    assert ours == {name: value for name, value in dvc.items() if not name.startswith("study.")}
    for name, value in ours.items():
        if isinstance(value, float):  # `lr: 1` is the number 1.0 to a stage
            assert type(dvc[name]) in (int, float)
        else:
            assert type(dvc[name]) is type(value)


pieces = (
    st.text()
    | st.text("0123456789abx_.:-+eE[]{}&*!<>|?#'\"%@~,\t\n ")
    | st.sampled_from(["!!int ", "!!bool ", "<<: *"])
)
anywhere = st.builds(
    lambda at, piece, cut: GOOD[:at] + piece + GOOD[at + cut :], st.integers(0, len(GOOD)), pieces, st.integers(0, 20)
)


@settings(deadline=None)
@given(content=pieces | anywhere | st.binary())
@example(content="[" * 1000)
@example(content="0b_")
@example(content="2001-99-99")
@example(content="!!timestamp x")
@example(content="&a [*a]")
@example(content="&a {data: *a}")
@example(content="&a {<<: *a}")
@example(content="? {}\n: 1")
@example(content='"\\ud800": 1')
@example(content=edited("seed", 5000 * "9"))
@example(
    content=edited(
        "lr", "[" + "&a [1,1,1,1,1,1,1,1,1,1],&b [*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b],&d [*c,*c,*c,*c,*c,*c]]"
    )
)
def test_whatever_the_file_holds_it_is_read_or_refused_in_one_line(
    content: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    refusal = ""
    try:
        load(tmp_path_factory.getbasetemp(), content)
    except UserError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1
    assert len(refusal) < 1000


def test_a_process_refuses_with_one_line_on_stderr_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(edited("epochs", "many"))
    project.put_code(tmp_path)
    command = [sys.executable, "-m", "mnist_mlp.params"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("params: params.yaml: train.epochs is 'many': ")
    assert process.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lineage", "mnist_mlp", "params.yaml", "stages"]
