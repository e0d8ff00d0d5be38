"""The pipeline's stages, one file each: ``dvc repro`` runs those that are due, ``python -m stages.NAME`` runs one."""

import mnist_mlp  # noqa: F401, sets what must be set before a stage imports PyTorch
