import http.client
import io
import json
import os
import shutil
import socket
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import mlflow
import numpy as np
import pytest
import torch
import uvicorn
from numpy.typing import NDArray
from PIL import Image, ImageOps
from playwright.sync_api import expect, sync_playwright

import lineage
from lineage import UserError, registry, store
from mnist_mlp import champion, params, predict, record, serve
from mnist_mlp.recipe import data, net
from tests import project
from tests.conftest import Call
from tests.loopback import free_port, running

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS = data.SHAPE
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Whatever somebody wanted to download, they would have to ask for where nobody answers.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


class Repository(NamedTuple):
    folder: Path  # with an MLflow store of its own
    model: torch.nn.Module  # its champion, as MLflow loads it


@pytest.fixture(scope="module")
def repository(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """A finished repository in another place. This process works there."""
    folder = project.copy(finished, tmp_path_factory.mktemp("repository"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lineage, "ROOT", folder)
        patch.setattr(lineage, "HERE", folder)
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        store.connect(record.EXPERIMENT)
        copy = tmp_path_factory.mktemp("model")  # MLflow writes a file beside the model that it loads
        yield Repository(folder, mlflow.pytorch.load_model(registry.uri(record.NAME), dst_path=str(copy)))


def crown(alias: str) -> None:
    """Register the model that was logged last, with an alias."""
    model = mlflow.last_logged_model()
    assert model
    version = mlflow.register_model(model.model_uri, record.NAME, tags={"data.digest": data.DIGEST})
    mlflow.MlflowClient().set_registered_model_alias(record.NAME, alias, version.version)


@pytest.fixture(scope="module")
def digits(mnist: Path) -> NDArray[np.uint8]:
    return data.load("t10k", mnist)[0]


@pytest.fixture(scope="module")
def url(repository: Repository) -> Iterator[str]:
    with running(
        sys.executable, "-m", "mnist_mlp.serve", "--port", "{port}", cwd=repository.folder, env=OFFLINE
    ) as server:
        yield server.url


def post(url: str, body: Any, path: str = "/invocations") -> tuple[int, Any]:
    """Status and content of the answer; a body in pieces, or without a known length, is sent as it comes."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    connection.request("POST", path, body)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def assert_serves(url: str, repository: Repository, images: NDArray[np.uint8]) -> None:
    status, answer = post(url, json.dumps({"inputs": images.tolist()}))
    assert status == 200
    with torch.no_grad():
        expected = repository.model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(answer["predictions"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_images_become_the_models_probabilities(
    url: str, repository: Repository, digits: NDArray[np.uint8], count: int
) -> None:
    assert_serves(url, repository, digits[:count])


def test_only_this_machine_is_answered_and_no_page_loads_from_elsewhere(url: str) -> None:
    address = urllib.parse.urlsplit(url)
    for path, status in (("/", 200), ("/ping", 200), ("/health", 200), ("/docs", 404), ("/openapi.json", 404)):
        connection = http.client.HTTPConnection(address.netloc, timeout=30)
        connection.request("GET", path)
        assert connection.getresponse().status == status
    assert address.port
    with pytest.raises(OSError, match="refused"):  # as all other addresses of this machine, which a network reaches
        socket.create_connection(("127.0.0.2", address.port))


def with_pixel(value: object) -> str:
    image: list[list[object]] = [[0] * COLUMNS for _ in range(ROWS)]
    image[3][4] = value
    return json.dumps({"inputs": [image]})


def of_shape(*shape: int) -> str:
    return json.dumps({"inputs": np.zeros(shape, int).tolist()})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(with_pixel(300), "inputs[0][3][4]: Input should be less than or equal to 255", id="300"),
        pytest.param(with_pixel(-1), "inputs[0][3][4]: Input should be greater than or equal to 0", id="-1"),
        pytest.param(with_pixel(10**400), "inputs[0][3][4]: Input should be less than or equal to 255", id="10**400"),
        pytest.param(with_pixel(1.5), "inputs[0][3][4]: Input should be a valid integer", id="1.5"),
        pytest.param(with_pixel("12"), "inputs[0][3][4]: Input should be a valid integer", id="string"),
        pytest.param(with_pixel(True), "inputs[0][3][4]: Input should be a valid integer", id="true"),
        pytest.param(with_pixel(None), "inputs[0][3][4]: Input should be a valid integer", id="null"),
        pytest.param(with_pixel(float("nan")), "inputs[0][3][4]: Input should be a valid integer", id="NaN"),
        pytest.param(with_pixel([0]), "inputs[0][3][4]: Input should be a valid integer", id="ragged"),
        pytest.param(of_shape(ROWS, COLUMNS), "inputs[0][0]: Input should be a valid array", id="no batch"),
        pytest.param(of_shape(1, ROWS * COLUMNS), "inputs[0][0]: Input should be a valid array", id="flat"),
        pytest.param(of_shape(1, 1, ROWS, COLUMNS), "inputs[0][0][0]: Input should be a valid integer", id="channels"),
        pytest.param(
            of_shape(2, ROWS, COLUMNS - 1), f"inputs[0][0]: List should have at least {COLUMNS} items", id="narrow"
        ),
        pytest.param(of_shape(2, ROWS + 1, COLUMNS), f"inputs[0]: List should have at most {ROWS} items", id="high"),
        pytest.param(of_shape(0), "inputs: List should have at least 1 item", id="empty batch"),
        pytest.param('{"inputs": "7"}', "inputs: Input should be a valid array", id="text"),
        pytest.param('{"input": []}', "inputs: Field required", id="no inputs"),
        pytest.param("[]", "body: Input should be an object", id="list"),
        pytest.param("", "body: Invalid JSON: EOF", id="empty"),
        pytest.param('{"inputs": [[', "body: Invalid JSON: EOF", id="cut short"),
        pytest.param(b'{"inputs": "\xff"}', "body: Invalid JSON: invalid unicode", id="not UTF-8"),
        pytest.param("[" * 100_000, "body: Invalid JSON: recursion limit exceeded", id="deep"),
        pytest.param('{"inputs": [[[' + "1" * 1_000_000, "body: Invalid JSON: number out of range", id="long number"),
    ],
)
def test_a_wrong_request_is_told_why_and_the_next_is_served(
    url: str, repository: Repository, digits: NDArray[np.uint8], body: str | bytes, reason: str
) -> None:
    status, answer = post(url, body)
    assert status == 400
    assert answer["detail"].startswith(reason)
    assert_serves(url, repository, digits[:1])


def png(levels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(levels).save(content, "PNG")
    return content.getvalue()


@pytest.mark.recipe
def test_a_picture_is_read_as_predict_reads_it_or_refused_with_the_reason(
    url: str, repository: Repository, digits: NDArray[np.uint8]
) -> None:
    status, answer = post(url, png(255 - digits[0]), "/picture")
    assert status == 200
    image = np.array(answer["image"], np.uint8)
    assert np.array_equal(image, predict.as_mnist(255 - digits[0].astype(np.float32)))
    with torch.no_grad():
        expected = repository.model(torch.from_numpy(image[None])).numpy()[0]
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=0, atol=1e-6)
    for body, reason in ((b"", "not a picture"), (png(np.zeros((99, 99), np.uint8)), "a blank picture")):
        status, answer = post(url, body, "/picture")
        assert status == 400
        assert answer["detail"].startswith(reason)


@pytest.mark.full
@pytest.mark.recipe
@pytest.mark.skipif(not BROWSER, reason="neither Chromium nor Chrome is installed")
def test_a_seven_is_read_while_it_is_drawn_in_a_browser(url: str, tmp_path: Path, digits: NDArray[np.uint8]) -> None:
    (tmp_path / "two.png").write_bytes(png(255 - digits[1]))
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=BROWSER) as browser:
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        answer = page.locator("#answer")
        expect(page.locator("#version")).to_contain_text("version 1 answers; its test accuracy is ")

        box = page.locator("#paper").bounding_box()
        assert box
        for place, (x, y) in enumerate([(80, 70), (200, 70), (130, 220)]):
            page.mouse.move(box["x"] + x, box["y"] + y, steps=10)
            if place == 0:
                page.mouse.down()
        expect(answer).to_have_text("This is a 7.")  # the mouse is still down
        page.mouse.up()
        page.set_input_files("#file", tmp_path / "two.png")  # as when it is dropped
        expect(answer).to_have_text("This is a 2.")
        seen = page.evaluate("Array.from(seen.getImageData(0, 0, 28, 28).data).filter((_, byte) => byte % 4 == 0)")
        image = np.array(seen).reshape(1, ROWS, COLUMNS)
        bars = page.locator("progress").evaluate_all("bars => bars.map(bar => bar.value)")
        _, expected = post(url, json.dumps({"inputs": image.tolist()}))
        np.testing.assert_allclose([bars], expected["predictions"], rtol=0, atol=1e-6)

        page.get_by_role("button", name="Clear").click()
        page.mouse.move(box["x"] - 20, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 100, box["y"] + 100, steps=5)  # not a stroke: it began beside the paper
        page.mouse.up()
        expect(answer).to_have_text("")
        assert page.evaluate("ink.getImageData(0, 0, 280, 280).data.every(byte => byte == 255)")
        assert all(request.startswith(url) for request in requests)


@pytest.mark.parametrize("path", ["/invocations", "/picture"])
def test_a_huge_request_is_told_so_and_the_next_is_served(
    url: str, repository: Repository, digits: NDArray[np.uint8], path: str
) -> None:
    piece = b"[" + b"0," * (1 << 19)
    for body in (piece * 100, iter([piece] * 100)):  # with its length ahead, and without
        status, answer = post(url, body, path)
        assert status == 413
        assert answer["detail"].startswith(
            f"{100 * len(piece):,} bytes are more than the {serve.LIMIT:,} of one request"
        )
    status, _ = post(url, b'{"inputs": [' + b"0," * (serve.LIMIT // 2 - 100), path)  # as much as is read at all
    assert status == 400
    assert_serves(url, repository, digits[:1])


def test_a_client_that_hangs_up_leaves_the_server_as_it_was(
    url: str, repository: Repository, digits: NDArray[np.uint8]
) -> None:
    address = urllib.parse.urlsplit(url)
    assert address.hostname
    assert address.port
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b'POST /invocations HTTP/1.1\r\nHost: mnist\r\nContent-Length: 1000\r\n\r\n{"inputs": ')
    assert_serves(url, repository, digits[:1])


@pytest.mark.recipe
def test_pictures_on_disk_are_read_whatever_they_look_like(
    repository: Repository, digits: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:  # fmt: skip
    with torch.no_grad():
        probabilities = repository.model(torch.from_numpy(digits)).numpy()
    sure = np.flatnonzero(probabilities.max(1) > 0.999)[:5]
    light = [Image.fromarray(digits[index]) for index in sure]
    pictures = {
        "light on dark.png": light[0],
        "dark on light.png": ImageOps.invert(light[1]),
        "large.jpg": ImageOps.invert(light[2]).resize((300, 200), Image.Resampling.BICUBIC).convert("RGB"),
        "small on a large sheet.png": ImageOps.expand(ImageOps.invert(light[3]), (200, 10, 50, 300), fill=255),
        "transparent.png": Image.new("RGBA", (28, 28), "navy"),
    }
    pictures["transparent.png"].putalpha(light[4])
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    Image.new("L", (50, 50), 200).save(tmp_path / "blank.png")
    (tmp_path / "not a picture.png").write_text("7")
    (tmp_path / "cut short.png").write_bytes((tmp_path / "large.jpg").read_bytes()[:1000])

    wrong = {
        "blank.png": "a blank picture: nothing on it stands out from the paper",
        "not a picture.png": "not a picture that Pillow can read",
        "cut short.png": "not a whole picture: image file is truncated",
        os.fsdecode(b"not UTF-8: \xff.png"): "No such file or directory",
    }
    paths = [*pictures, *wrong]
    monkeypatch.setattr(predict, "CALLER", tmp_path)  # a path starts where the user is
    status, output, errors = call(predict.main, *paths)
    assert status == 1
    lines = [line.rpartition(", probability ") for line in output.splitlines()]
    assert [found for found, _, _ in lines] == [
        f"{path}: {probabilities[index].argmax()}" for path, index in zip(paths, sure, strict=False)
    ]
    assert all(0.1 < float(probability) <= 1 for _, _, probability in lines)
    for line, (name, reason) in zip(errors.splitlines(), wrong.items(), strict=True):
        assert line.startswith(f"predict: {name.encode(errors='replace').decode()}: {reason}")


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve", "--port", str(port)])
        line = f"cannot listen on 127.0.0.1:{port}: Address already in use; try `make serve PORT={port + 1}`"
        with pytest.raises(UserError, match=line):
            serve.main()


@pytest.mark.parametrize(("module", "missing"), [(record, "NAME"), (registry, "CHAMPION")])
@pytest.mark.usefixtures("repository")
def test_without_a_champion_it_says_what_to_do(
    module: ModuleType, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, missing, "nobody")
    with pytest.raises(
        UserError, match=r"no usable models:/.*nobody.*not found; `make track` makes it from the results"
    ):
        champion.load()


@pytest.mark.usefixtures("repository")
def test_a_champion_of_other_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DIGEST", "0" * 32)
    with pytest.raises(UserError, match=f"version 1, was made from other data than {data.NAME} as mnist_mlp/recipe"):
        champion.load()


@pytest.mark.usefixtures("repository")
def test_a_pickled_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net.mlp(params.load().model.hidden)
    mlflow.pytorch.log_model(model, name="pickled", serialization_format="pickle", pip_requirements=[])
    crown("pickled")
    monkeypatch.setattr(registry, "CHAMPION", "pickled")
    with pytest.raises(UserError, match="pickle is disallowed"):
        champion.load()


def test_the_server_says_its_address(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setattr(sys, "argv", ["serve", "--port", str(port)])
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    serve.main()
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"to draw, open http://127.0.0.1:{port}/; to send images, POST to its /invocations"
    )
