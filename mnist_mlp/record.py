"""What MLflow keeps of MNIST: the names of its experiments and its model, and how a model is stored."""

import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress

import mlflow
import numpy as np
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

import lineage
from lineage import md5, pages, registry, runs, store
from mnist_mlp.params import Params
from mnist_mlp.published import PUBLISHED, published_history
from mnist_mlp.recipe import MODEL, data
from mnist_mlp.recipe.params import SOURCES

EXPERIMENT = "mnist"
STUDY = f"{EXPERIMENT}-study"  # an experiment of its own: its hundred runs would hide the pipeline's
NAME = "mnist-mlp"  # of the model in MLflow's registry
# To choose the champion by: to choose by the test set is to train on it, but some have no validation set.
RANKS = ("validation_accuracy", "accuracy")
ABOUT = (
    f"Models of {data.NAME} that reach the target: raw images in, probabilities out. A version names its run and "
    f"commit. `{registry.CHAMPION}` is the best one: `make serve` answers from it, `make verify` proves it."
)
TAGS = {"torch": importlib.metadata.version("torch")}
COLUMNS = ("metrics.`accuracy`", "metrics.`test_acc`", "metrics.`test_loss`", "params.`train.lr`",
           "params.`train.epochs`", "params.`train.seed`")  # fmt: skip
PUBLISHED_RUN = "published"
COLOUR = "mlflow.runColor"  # a tag of a run
SETTING = "setting"  # a tag in the study's experiment: which values a run has; the rows of MLflow's table


def training(config: Params) -> runs.Training:
    """Say what a run of the pipeline is made from; the parameters that decide no byte come last."""
    source = HTTPDatasetSource(config.data.mirrors[0])
    dataset = MetaDataset(source, name=data.NAME, digest=data.DIGEST)  # type: ignore[abstract]
    values = dict(sorted(config.flat().items(), key=lambda item: item[0] in SOURCES))
    return runs.Training(EXPERIMENT, values, dataset, TAGS, unnamed=SOURCES)


def log_model(config: Params) -> str:
    """Store the model in the active run: raw images (N, *SHAPE) in, probabilities (N, CLASSES) out.

    Args:
        config: the parameters that it was trained with.

    Returns:
        Its id in MLflow.
    """
    from mlflow.models import ModelSignature  # here: these load PyTorch, which takes seconds, and track rarely needs it
    from mlflow.types import Schema, TensorSpec

    from mnist_mlp.recipe import net

    model, weights = net.mlp(config.model.hidden), MODEL.read_bytes()
    net.load_weights(model, weights, str(MODEL))
    logged = mlflow.pytorch.log_model(
        net.ImageClassifier(model, config.data.mean, config.data.std).eval(),
        name=f"{EXPERIMENT}-{md5(weights)[:7]}",
        serialization_format="pt2",  # no pickle
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *data.SHAPE))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, data.CLASSES))]),
        ),
        input_example=data.load("t10k")[0][:2],
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "torch")],
    )
    return str(logged.model_id)


def summary(config: Params, metrics: Mapping[str, float]) -> str:
    """Say in Markdown what came out; MLflow's page shows the first lines."""
    published = "".join(f", published {row['test_acc']:.4%}" for row in published_history()[-1:])
    target = config.evaluate.target_accuracy
    reached = "reached" if metrics["accuracy"] >= target else "missed"
    return (
        f"Test accuracy **{metrics['accuracy']:.2%}** of {data.SIZES['t10k']:,} images: target {target:.2%} {reached}. "
        f"Mean of batches {metrics['batch_mean_accuracy']:.4%}{published}."
    )


def decide(run: Run, config: Params) -> str:
    """Make the run's model a version if it reaches the target, decide who is champion, and say what came of it."""
    if not config.evaluate.register_model:
        return "not registered: evaluate.register is false"
    state, version = "not registered, because the target is missed", None
    if run.data.metrics["accuracy"] >= config.evaluate.target_accuracy:
        version = registry.register(run, NAME, ABOUT, RANKS)
        state = f"{NAME} version {version.version}"
    champion = registry.crown(NAME, data.DIGEST, RANKS)
    if champion is None:
        return f"{state}; there is no champion of these data"
    same = version and champion.version == version.version
    return f"{state}, the champion" if same else f"{state}; the champion is version {champion.version}"


@store.in_one_line("make track")
def publish(experiment: str) -> None:
    """Add the tutorial's history once, so that charts can show it beside ours. If a user deletes it, it stays away.

    The colour is its last part: without it, the process that made the run was killed.

    Raises:
        UserError: MLflow refuses.
    """
    history, client = published_history(), mlflow.MlflowClient()
    if not history:
        return
    found = store.search(experiment, f"attributes.run_name = '{PUBLISHED_RUN}'", ViewType.ALL)
    if any(COLOUR in run.data.tags or run.info.lifecycle_stage == "deleted" for run in found):
        return
    note = f"The figures that the tutorial prints, from `{PUBLISHED}`. No model belongs to them."
    tags = {MLFLOW_RUN_NOTE: note, SETTING: PUBLISHED_RUN}
    identity = store.experiment_id(experiment)
    run = found[0] if found else client.create_run(identity, tags=tags, run_name=PUBLISHED_RUN)
    if not run.data.metrics:
        client.log_batch(run.info.run_id, runs.points(history))
    with suppress(MlflowException, OSError):  # an extra: MLflow's page of comparison fails for a run without a file
        client.log_artifact(run.info.run_id, str(lineage.HERE / PUBLISHED))
    client.set_terminated(run.info.run_id, end_time=run.info.start_time)  # nothing was trained
    client.set_tag(run.info.run_id, COLOUR, "#000000")


def lead() -> str:
    """Say how to open the pipeline's runs."""
    return pages.lead(EXPERIMENT, f"A run is one state of `dvc.lock`{_about_published()}.", COLUMNS)


def lead_to_study(settings: list[str]) -> str:
    """Say how to open the study's runs, with a row for each setting."""
    note = (
        "Each study has a row for each setting, and MLflow loads 100 runs at a time: after *Load more*, the means are "
        f"those of all runs{_about_published()}."
    )
    return pages.lead(STUDY, note, COLUMNS, SETTING, settings)


def _about_published() -> str:
    return f"; `{PUBLISHED_RUN}` is the tutorial's" if published_history() else ""
