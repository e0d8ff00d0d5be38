"""Serve the champion on loopback: ``make serve``, or ``python -m mnist_mlp.serve --port 5001``.

The protocol is that of ``mlflow models serve``, which serves the same model: POST /invocations takes
``{"inputs": [image, ...]}`` and answers ``{"predictions": [[probability of 0, ... of 9], ...]}``; GET /ping and /health
say that the server is up. But MLflow's server takes 1.5, "12" and true for pixels, answers 500 where JSON is nested too
deeply or the content type is missing, reads a request of any size into memory, and is several times slower: hence this
one. GET / is a page to draw on, and POST /picture, which it uses, takes a picture as ``predict`` does.
"""

import argparse
import gc
import os
import socket
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from mlflow.entities.model_registry import ModelVersion
from pydantic import BaseModel, FailFast, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from lineage import UserError, run_command
from mnist_mlp import champion, predict, record
from mnist_mlp.recipe import data

LIMIT = 32 << 20  # bytes of a request: MNIST's test images fit, and their JSON takes less than 1 GB and 1 s to read
PAGE = Path(__file__).with_name("draw.html")

Pixel = Annotated[int, Field(strict=True, ge=0, le=255)]
ROWS, COLUMNS = data.SHAPE
Row = Annotated[list[Pixel], Field(min_length=COLUMNS, max_length=COLUMNS), FailFast()]
Image = Annotated[list[Row], Field(min_length=ROWS, max_length=ROWS), FailFast()]


class Invocation(BaseModel):
    """A request: images of ROWS rows of COLUMNS whole numbers, 0 for paper to 255 for ink."""

    inputs: Annotated[list[Image], Field(min_length=1), FailFast()]


def main() -> None:
    """Load the champion and answer until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m mnist_mlp.serve", description="Serve the champion on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=5001)
    port = parser.parse_args().port
    if not 0 < port < 1 << 16:
        parser.error("a port is a number from 1 to 65535")
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason, other = os.strerror(error.errno or 0), port + 1 if port < 65535 else port - 1
        raise UserError(f"cannot listen on 127.0.0.1:{port}: {reason}; try `make serve PORT={other}`") from None
    # A second thread saves 1 ms of the 20 ms that 256 images take. But if other processes use its core, it costs
    # 100 ms, because the first thread waits for it.
    torch.set_num_threads(1)
    version, classify = champion.load()
    gc.freeze()  # the libraries' objects stay; a search for garbage among them takes 0.4 s, while requests wait
    print(
        f"serving {record.NAME} version {version.version}, model {version.tags.get('model.md5', 'unknown')}\n"
        f"to draw, open http://127.0.0.1:{port}/; to send images, POST to its /invocations",
        flush=True,
    )
    try:
        uvicorn.Server(uvicorn.Config(server(version, classify), access_log=False)).run(sockets=[listener])
    finally:
        gc.unfreeze()  # so that Python can free these objects at its end; otherwise nanobind, a part of Triton, warns


def server(version: ModelVersion, classify: champion.Classifier) -> FastAPI:
    """Put a model behind ``/invocations``; a request that is wrong gets status 400, a huge one 413, and the reason."""
    app = FastAPI(openapi_url=None)  # without the generated pages, which would load scripts from elsewhere

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    @app.get("/ping")
    @app.get("/health")
    async def ping() -> Response:
        return Response()

    @app.get("/version")
    async def served_version() -> dict[str, str | None]:
        return {
            "name": version.name,
            "version": str(version.version),
            "run_id": version.run_id,
            "model.md5": version.tags.get("model.md5"),
            "accuracy": version.tags.get("accuracy"),
        }

    @app.post("/invocations")
    async def invocations(request: Request) -> JSONResponse:
        try:
            images = np.array(Invocation.model_validate_json(await _body(request)).inputs, np.uint8)
        except ValidationError as error:
            raise HTTPException(400, _reason(error)) from None
        return JSONResponse({"predictions": classify(images).tolist()})

    @app.post("/picture")
    async def picture(request: Request) -> JSONResponse:
        body = await _body(request)
        try:  # beside the loop, which answers others meanwhile: a large photograph takes a second
            image = await run_in_threadpool(lambda: predict.as_mnist(predict.grey_levels(body)))
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({"image": image.tolist(), "probabilities": classify(image[np.newaxis])[0].tolist()})

    return app


async def _body(request: Request) -> bytes:
    """Read to the end, but keep no more than the limit: a client that is still sending would not see the answer."""
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= LIMIT:
                body += chunk
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the request") from None
    if size > LIMIT:
        raise HTTPException(
            413, f"{size:,} bytes are more than the {LIMIT:,} of one request; send fewer or smaller images"
        )
    return bytes(body)


def _reason(error: ValidationError) -> str:
    """Say what is wrong and where, such as ``inputs[0][3][4]: Input should be a valid integer``."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    expected = f'{{"inputs": [image, ...]}}, each image {ROWS} rows of {COLUMNS} whole numbers from 0 to 255'
    return f"{place or 'body'}: {first['msg']}; expected {expected}"


if __name__ == "__main__":
    run_command(main)
