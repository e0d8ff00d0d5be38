"""Train the recipe once for each seed and setting of ``study``, and write two tables of what comes out.

A run is kept as soon as it ends, so that nothing is trained twice: after an interruption, or with more seeds, only the
missing runs are trained.
"""

import json
import statistics
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress

from tqdm import tqdm

import lineage
from lineage import ROOT, git, lock, run_command, write
from mnist_mlp import params
from mnist_mlp.params import Params
from mnist_mlp.recipe import data
from mnist_mlp.recipe.history import FIGURES, csv_text
from mnist_mlp.recipe.params import VARIABLE
from mnist_mlp.study import cluster, plan

KEPT = ROOT / "study/runs"  # one file a run; not in Git
TABLES = (plan.RUNS, plan.HISTORY)


def main() -> None:
    """Train what is missing, and write the tables of all runs."""
    config = params.load()
    members = plan.configs(config)
    fingerprint = cluster.fingerprint(config)
    code = {path: lock.path_md5(path) for path in _dependencies(plan.PIPELINE.read_bytes())}
    keys = [_key(member, code, fingerprint) for member in members]

    if set(keys) - _kept(keys).keys():
        for key, run in _committed(config, code, fingerprint, set(keys)).items():
            _keep(key, run)
    runs = _kept(keys)
    missing = [(key, member) for key, member in zip(keys, members, strict=True) if key not in runs]
    print(f"{len(members)} runs, {len(missing)} of them to train", flush=True)
    with tqdm(total=len(members), initial=len(members) - len(missing), unit="run", disable=None) as bar:
        for index, run in cluster.run_all([member for _, member in missing]) if missing else []:
            key, member = missing[index]
            _keep(key, run)
            runs[key] = run
            bar.update()
            bar.set_postfix_str(_mean(runs))
            if bar.disable:
                outcome = f"accuracy {run.metrics['accuracy']}" if run.metrics else "diverged"
                print(f"{plan.label(plan.identity(member))}: {outcome}", flush=True)

    for path, table in zip(TABLES, tables(config, [runs[key] for key in keys]), strict=True):
        write(path, table)


def tables(config: Params, runs: Sequence[plan.Outcome]) -> tuple[str, str]:
    """Make runs.csv, one row a run, and history.csv, one row a run and epoch.

    Args:
        config: for the names of the varied parameters.
        runs: in the order of ``plan.configs``, so that the bytes do not depend on which run ended first.
    """
    heads = [plan.identity(member) for member in plan.configs(config)]
    rows = [head | run.metrics | {"model_md5": run.model_md5} for head, run in zip(heads, runs, strict=True)]
    history = [
        head | {"epoch": str(epoch)} | figures
        for head, run in zip(heads, runs, strict=True)
        for epoch, figures in enumerate(run.history)
    ]
    metrics = dict.fromkeys([*plan.METRICS, *(name for run in runs for name in run.metrics)])
    figures = dict.fromkeys([*FIGURES, *(name for run in runs for row in run.history for name in row)])
    return csv_text([*heads[0], *metrics, "model_md5"], rows), csv_text([*heads[0], "epoch", *figures], history)


def _mean(runs: dict[str, plan.Outcome]) -> str:
    accuracies = [float(run.metrics["accuracy"]) for run in runs.values() if run.metrics]
    return f"mean accuracy {statistics.mean(accuracies):.2%}" if accuracies else "all diverged"


def _key(member: Params, code: dict[str, str | None], fingerprint: str) -> str:
    """Name a run by all that decides what it gives: parameters, code, data, and how this machine computes."""
    values = {name: member.flat()[name] for name in (*VARIABLE, "train.seed")}
    return lineage.md5(json.dumps([values, code, data.DIGEST, fingerprint], sort_keys=True).encode())


def _dependencies(pipeline: bytes) -> dict[str, str | None]:
    """List the files that stage ``replicate`` reads, but for MNIST's, with the MD5 if this is a ``dvc.lock``."""
    listed = lock.read_stages(pipeline)["replicate"]["deps"]
    files = {file["path"]: file["md5"] for file in listed} if isinstance(listed[0], dict) else dict.fromkeys(listed)
    return {path: md5 for path, md5 in files.items() if path != str(data.RAW)}


def _keep(key: str, run: plan.Outcome) -> None:
    write(KEPT / f"{key}.json", json.dumps(run._asdict()))


def _kept(keys: Iterable[str]) -> dict[str, plan.Outcome]:
    """Read the runs that earlier calls have kept."""
    found = {}
    for key in keys:
        with suppress(FileNotFoundError, ValueError, TypeError):  # a damaged file is as good as none
            found[key] = plan.Outcome(**json.loads((KEPT / f"{key}.json").read_text()))
    return found


def _committed(
    config: Params, code: dict[str, str | None], fingerprint: str, wanted: Set[str]
) -> dict[str, plan.Outcome]:
    """Read the runs in the tables that Git has, if the same code made them and one comes out the same here.

    DVC removes the tables themselves before it runs this stage.
    """
    committed, *texts = (git.run("show", f"HEAD:{path}").stdout for path in (plan.LOCK, *TABLES))
    if not committed or _dependencies(committed) != code:
        return {}
    recorded = {"replicate": lock.read_stages(committed)["replicate"]}
    if lock.results(recorded) != {str(path): lineage.md5(table) for path, table in zip(TABLES, texts, strict=True)}:
        return {}
    made_with = {name: value for name, value in lock.parameters(recorded).items() if name in VARIABLE}
    base = config.replaced(made_with)
    rows = plan.read(*(text.decode() for text in texts))
    members = [(plan.config_of(row, base), run) for row, run in rows]
    found = {_key(member, code, fingerprint): run for member, run in members}
    sample = next(((member, run) for member, run in members if run.model_md5), None)
    if sample is None or not found.keys() & wanted - _kept(found).keys():
        return {}
    print("training one of the committed runs again, to see whether this machine gives the same", flush=True)
    return found if cluster.train_run(sample[0]) == sample[1] else {}


if __name__ == "__main__":
    run_command(main)
