"""The pipeline's stages, one file each: ``dvc repro`` runs those that are due, ``python -m stages.NAME`` runs one."""

import os
import sys

import mnist_mlp  # noqa: F401, sets what must be set before a stage imports PyTorch

if sys.argv[0] == "-m":  # a stage is run, and only writes files; but a notebook hands its own backend down to it
    os.environ["MPLBACKEND"] = "agg"
    if sys.orig_argv[sys.orig_argv.index("-m") + 1] in ("stages.train", "stages.evaluate", "stages.replicate"):
        print("loading PyTorch", flush=True)  # which takes seconds
