"""Prove a model or a commit: run again what made it, and compare. ``make verify``, ``make verify MODEL=HEAD``.

Exit status: 0 for identical, 1 for different, 2 where there is no answer, and why.
"""

import argparse
import sys
import time

import mlflow
from mlflow.exceptions import MlflowException

from lineage import UserError, md5, proof, registry, run_command, store
from mnist_mlp import champion, record
from mnist_mlp.recipe import HISTORY, METRICS, data

DATA_FILES = [data.RAW / name for name in data.SHA256]


def main() -> None:
    """Verify one model or commit, say what came of it, and exit with the status that says so too."""
    parser = argparse.ArgumentParser(prog="python -m mnist_mlp.verify", description="Run again, and compare.")
    best = registry.uri(record.NAME)
    parser.add_argument("model", nargs="?", default=best, help=f"{proof.FORMS}; {best} unless you name one")
    model = parser.parse_args().model
    start = time.perf_counter()
    try:
        found = proof.prove_commit(model, DATA_FILES) if proof.is_revision(model) else verify_run(model)
    except Exception as error:  # status 1 means 'different', so whatever prevents an answer must end with 2
        text = " ".join(str(error).split())
        if not isinstance(error, UserError | MlflowException | OSError):
            text = f"{type(error).__name__}: {text}"
        parser.exit(2, f"verify: {store.first_line(text)}\n")
    if found.difference:
        print(f"different: {found.origin}", *found.difference, sep="\n")
        sys.exit(1)
    print(f"identical: {found.origin}, every figure and byte, run again in {time.perf_counter() - start:.0f} s")


def verify_run(model: str) -> proof.Proof:
    """Prove a run of the pipeline, or a model by the run that made it.

    Raises:
        UserError: there is no such model, or its run cannot be proved.
    """
    run = proof.find(model, champion.advice() if model == registry.uri(record.NAME) else "")
    if mlflow.get_experiment(run.info.experiment_id).name == record.STUDY:
        raise UserError(f"run {run.info.run_id} is one of the study, whose runs `make study-check` proves")
    project = proof.Project(
        data.DIGEST, champion.OTHER_DATA, HISTORY, METRICS, hash_model, DATA_FILES, tags=tuple(record.TAGS)
    )
    return proof.prove_run(run, model, project)


def hash_model(uri: str) -> dict[str, str]:
    """Hash the weights of a stored model, and what it computes: right weights can stand in a wrong graph.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    import safetensors.torch  # here: a refusal needs no PyTorch, which takes seconds to load
    import torch

    model = registry.load(uri, mlflow.pytorch.load_model, champion.advice)
    weights = safetensors.torch.save({name.removeprefix("net."): tensor for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        probabilities = model(torch.from_numpy(data.load("t10k")[0]))
    return {
        "the MD5 of the stored model's weights": md5(weights),
        "the MD5 of its probabilities for the test images": md5(probabilities.numpy().tobytes()),
    }


if __name__ == "__main__":
    run_command(main)
