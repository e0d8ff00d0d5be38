"""A project of three small stages on the link of ``lineage``: ``python -m toy fit``, ``score``, ``track``.

``python -m toy prove RUN_ID`` runs again what made a run, and compares.
"""

import json
import sys
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.dataset import Dataset
from mlflow.data.meta_dataset import MetaDataset
from mlflow.models import infer_signature

from lineage import file_md5, lock, md5, proof, registry, run_command, runs, write

NAME = "line"  # of the experiment, and of the model in MLflow's registry
POINTS = Path("points.csv")
MODEL, HISTORY, METRICS = (Path("results", name) for name in ("line.json", "history.csv", "metrics.json"))
COLUMNS = ("epoch", "loss")


def main() -> None:
    """Run one stage, or prove a run or a model."""
    match sys.argv[1:]:
        case ["prove", model]:
            found = prove(model)
            print(found.origin, *(found.difference or ["identical"]), sep="\n")
        case [stage]:
            {"fit": fit, "score": score, "track": track}[stage]()


def fit() -> None:
    """Fit a line to the points by gradient descent on the mean squared error."""
    params = load_params()
    points = pd.read_csv(POINTS)
    slope = offset = 0.0
    history = []
    with runs.live(runs.Training(NAME, params, dataset())) as run:
        for epoch in range(int(str(params["fit.epochs"]))):
            error = slope * points["x"] + offset - points["y"]
            slope -= float(str(params["fit.lr"])) * float((error * points["x"]).mean())
            offset -= float(str(params["fit.lr"])) * float(error.mean())
            row = dict(zip(COLUMNS, (str(epoch), f"{(error**2).mean():.6f}"), strict=True))
            history.append(row)
            run.send(mlflow.log_metric, "loss", float(row["loss"]), step=epoch)
        line = json.dumps({"slope": slope, "offset": offset})
        write(MODEL, line)
        write(HISTORY, "\n".join(",".join(row) for row in (COLUMNS, *(row.values() for row in history))) + "\n")
        run.send(runs.add_model, run.id, md5(line.encode()), log_model)


def score() -> None:
    """Say how many of the points are near the line."""
    points, line = pd.read_csv(POINTS), json.loads(MODEL.read_text())
    near = (line["slope"] * points["x"] + line["offset"] - points["y"]).abs() < float(str(load_params()["score.near"]))
    write(METRICS, json.dumps({"accuracy": round(float(near.mean()), 6)}))


def track() -> None:
    """Make MLflow's record complete, and decide which version is the champion."""
    params = load_params()
    recorded = lock.recorded(params)
    metrics = json.loads(METRICS.read_text())
    note = f"{metrics['accuracy']:.0%} of the points are near the line."
    results = runs.Results(HISTORY, MODEL, log_model, metrics, {"": [METRICS]}, note)
    run, added = runs.track(runs.Training(NAME, params, dataset()), recorded, results)
    registry.register(run, NAME, "Lines through points.", ["accuracy"])
    champion = registry.crown(NAME, dataset().digest, ["accuracy"])
    print(f"run {run.info.run_id} {'is now' if added else 'was'} complete; champion {champion and champion.version}")


def prove(model: str) -> proof.Proof:
    """Run again what made a run or a model, and compare."""
    project = proof.Project(dataset().digest, "other points", HISTORY, METRICS, hash_model)
    return proof.prove_run(proof.find(model), model, project)


def load_params() -> dict[str, object]:
    """Read params.yaml: {"fit.lr": 0.1, ...}."""
    return lock.read_params(runs.PARAMS.read_bytes())


def dataset() -> Dataset:
    """Describe the points, with their digest."""
    return MetaDataset(CodeDatasetSource({}), name="points", digest=file_md5(str(POINTS)))  # type: ignore[abstract]


def log_model() -> str:
    """Store the line in the active run, as code and a JSON file: no pickle."""
    points = pd.read_csv(POINTS)
    logged = mlflow.pyfunc.log_model(
        name=NAME, python_model="line.py", artifacts={"line": str(MODEL)}, pip_requirements=["mlflow", "pandas"],
        signature=infer_signature(points[["x"]], points["y"]),
    )  # fmt: skip
    return str(logged.model_id)


def hash_model(uri: str) -> dict[str, str]:
    """Hash what a stored model computes for the points."""
    model = registry.load(uri, mlflow.pyfunc.load_model, lambda: "`python -m toy track` makes it")
    predicted = model.predict(pd.read_csv(POINTS)[["x"]])
    return {"the MD5 of its predictions": md5(json.dumps(list(map(float, predicted))).encode())}


if __name__ == "__main__":
    run_command(main)
