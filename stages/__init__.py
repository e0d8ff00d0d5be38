"""The pipeline's stages, one file each: ``dvc repro`` runs those that are due, ``python -m stages.NAME`` runs one."""

import sys

import mnist_mlp  # noqa: F401, sets what must be set before a stage imports PyTorch

LOADING = ("stages.train", "stages.evaluate", "stages.replicate")
if sys.argv[0] == "-m" and sys.orig_argv[sys.orig_argv.index("-m") + 1] in LOADING:
    print("loading PyTorch", flush=True)  # which takes seconds
