"""Train the recipe once for each seed and setting of ``study``, and write two tables of what comes out.

A run is kept as soon as it ends, so that nothing is trained twice: after an interruption, or with more seeds, only the
missing runs are trained.
"""

import json
import statistics
from collections.abc import Iterable, Set

from tqdm import tqdm

from mnist_mlp import ROOT, cluster, data, lineage, params, run_command, study, write
from mnist_mlp.params import VARIABLE, Params

KEPT = ROOT / "study/runs"  # one file a run; not in Git
TABLES = (study.RUNS, study.HISTORY)


def main() -> None:
    """Train what is missing, and write the tables of all runs."""
    config = params.load()
    members = study.configs(config)
    fingerprint = cluster.fingerprint(config)
    code = {path: lineage.file_md5(path) for path in _dependencies(study.PIPELINE.read_bytes())}
    keys = [_key(member, code, fingerprint) for member in members]

    runs = _kept(keys)
    runs |= _committed(config, code, fingerprint, set(keys) - runs.keys())
    missing = [(key, member) for key, member in zip(keys, members, strict=True) if key not in runs]
    print(f"{len(members)} runs, {len(missing)} of them to train", flush=True)
    with tqdm(total=len(members), initial=len(members) - len(missing), unit="run", disable=None) as bar:
        for index, run in cluster.run_all([member for _, member in missing]) if missing else []:
            key, member = missing[index]
            write(KEPT / f"{key}.json", json.dumps(run._asdict()))
            runs[key] = run
            bar.update()
            bar.set_postfix_str(_mean(runs))
            if bar.disable:
                print(_line(config, member, run), flush=True)

    for path, table in zip(TABLES, study.tables(config, [runs[key] for key in keys]), strict=True):
        write(path, table)


def _mean(runs: dict[str, study.Run]) -> str:
    accuracies = [float(run.metrics["accuracy"]) for run in runs.values() if run.metrics]
    return f"mean accuracy {statistics.mean(accuracies):.2%}" if accuracies else "all diverged"


def _line(config: Params, member: Params, run: study.Run) -> str:
    values = [f"{name} {member.flat()[name]}" for name in [*config.study.vary, "train.seed"]]
    return f"{', '.join(values)}: {'accuracy ' + run.metrics['accuracy'] if run.metrics else 'diverged'}"


def _key(member: Params, code: dict[str, str | None], fingerprint: str) -> str:
    """Name a run by all that decides what it gives: parameters, code, data, and how this machine computes."""
    values = {name: member.flat()[name] for name in (*VARIABLE, "train.seed")}
    return lineage.md5(json.dumps([values, code, data.DIGEST, fingerprint], sort_keys=True).encode())


def _dependencies(pipeline: bytes) -> dict[str, str | None]:
    """List the files that stage ``replicate`` reads, but for MNIST's, with the MD5 if this is a ``dvc.lock``."""
    listed = lineage.read_stages(pipeline)["replicate"]["deps"]
    files = {file["path"]: file["md5"] for file in listed} if isinstance(listed[0], dict) else dict.fromkeys(listed)
    return {path: md5 for path, md5 in files.items() if path != str(data.RAW)}


def _kept(keys: Iterable[str]) -> dict[str, study.Run]:
    """Read the runs that earlier calls have kept."""
    paths = {key: KEPT / f"{key}.json" for key in keys}
    return {key: study.Run(**json.loads(path.read_text())) for key, path in paths.items() if path.exists()}


def _committed(config: Params, code: dict[str, str | None], fingerprint: str, wanted: Set[str]) -> dict[str, study.Run]:
    """Read the runs in the tables that Git has, if the same code made them and a first epoch comes out the same here.

    DVC removes the tables themselves before it runs this stage.
    """
    lock, *tables = (lineage.git("show", f"HEAD:{path}").stdout for path in (study.LOCK, *TABLES))
    if not lock or _dependencies(lock) != code:
        return {}
    recorded = {"replicate": lineage.read_stages(lock)["replicate"]}
    if lineage.outputs(recorded) != {str(path): lineage.md5(table) for path, table in zip(TABLES, tables, strict=True)}:
        return {}
    made_with = {name: value for name, value in lineage.parameters(recorded).items() if name in VARIABLE}
    base = config.replaced(made_with)
    found: dict[str, study.Run] = {}
    for row, run in study.read(*(table.decode() for table in tables)):
        member = study.config_of(row, base)
        if (key := _key(member, code, fingerprint)) not in wanted:
            continue
        if not found and cluster.train_run(member.replaced({"train.epochs": 1})).history[:1] != run.history[:1]:
            return {}
        found[key] = run
    return found


if __name__ == "__main__":
    run_command(main)
