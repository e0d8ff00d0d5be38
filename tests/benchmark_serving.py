"""Time our server, MLflow's own, and a bare FastAPI endpoint around the same net, with images of the test set.

``python -m tests.benchmark_serving`` drives each with wrk (``apt install wrk``) from four connections that are kept
open, in batches of 1 and of 256, for five seconds after a second of warming up. It takes a minute, and asks for the
champion and the results of ``make repro``.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from lineage import UserError, registry, run_command
from mnist_mlp import params, record
from mnist_mlp.recipe import MODEL, data, net
from tests.loopback import running

CHAMPION = f"models:/{record.NAME}@{registry.CHAMPION}"
SERVERS = {
    "`make serve`": [sys.executable, "-m", "mnist_mlp.serve", "--port", "{port}"],
    "`mlflow models serve`": [
        *("mlflow", "models", "serve", "--model-uri", CHAMPION, "--env-manager", "local"),
        *("--host", "127.0.0.1", "--port", "{port}"),
    ],
    "bare FastAPI": [sys.executable, "-m", "tests.benchmark_serving", "bare", "{port}"],
}


class Batch(BaseModel):
    inputs: list[list[list[int]]]


def bare(port: int) -> None:
    """What one would write first."""
    config, app = params.load(), FastAPI()
    model = net.mlp(config.model.hidden)
    net.load_weights(model, MODEL.read_bytes(), str(MODEL))
    classifier = net.ImageClassifier(model, config.data.mean, config.data.std)

    @app.get("/health")
    def health() -> None: ...

    @app.post("/invocations")
    def invocations(batch: Batch) -> dict[str, list[list[float]]]:
        with torch.no_grad():
            return {"predictions": classifier(torch.tensor(batch.inputs, dtype=torch.uint8)).tolist()}

    uvicorn.run(app, port=port, access_log=False)


def main() -> None:
    if not shutil.which("wrk"):
        raise UserError("the load generator is missing; `apt install wrk` installs it")
    images, _ = data.load("t10k")
    print("| server | images a request | requests/s | images/s | median | 99th percentile |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch, "post.lua")
        for name, command in SERVERS.items():
            with running(*command) as server:
                for batch_size in (1, 256):
                    body = json.dumps(json.dumps({"inputs": images[:batch_size].tolist()}))  # quoted, as Lua does too
                    script.write_text(
                        f'wrk.method = "POST"\nwrk.body = {body}\nwrk.headers["Content-Type"] = "application/json"'
                    )
                    drive(server.url, script, 1)
                    rate, median, tail = drive(server.url, script, 5)
                    print(
                        f"| {name} | {batch_size} | {rate:,.0f} | {rate * batch_size:,.0f} | {median} | {tail} |",
                        flush=True,
                    )


def drive(url: str, script: Path, seconds: int) -> tuple[float, str, str]:
    """Requests a second, and the median and 99th percentile of their latency, with units."""
    output = subprocess.run(
        ["wrk", "-t1", "-c4", f"-d{seconds}s", "--timeout", "30s", "--latency", "-s", script, f"{url}/invocations"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = re.search(r"\n +50% +(\S+).*\n +99% +(\S+).*\nRequests/sec: +(\S+)", output, re.DOTALL)
    if found is None or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(output)
    median, tail, rate = found.groups()
    return float(rate), median, tail


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(int(sys.argv[2]))
    else:
        run_command(main)
