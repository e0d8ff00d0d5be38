# `make` alone lists the commands. All of them work in .venv, which they set up when it is missing or out of date.
# GNU make 3.81 and the tools of macOS and BSD are enough.
PYTHON ?= python3
MODEL ?=
PORT ?= 5001
RUNS ?= 2
BIN := .venv/bin
# uv reads none of pip's settings, so it gets the index that pip uses. With `user = true`, pip would list some only.
UV = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$(PIP_USER=0 $(BIN)/python -m pip config list | \
    sed -n 's/^[a-z:]*\.index-url=.\(.*\).$$/\1/p' | head -n 1)}" $(BIN)/uv
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro study study-check test test-full verify serve track bench lock clone venv packages
.NOTPARALLEL:

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: .venv/installed  ## set up .venv from requirements.txt

repro: clone setup  ## run what is due of the pipeline, and say what came out
	@$(BIN)/python -m mnist_mlp.params
	@$(BIN)/dvc repro
	@$(BIN)/python -m stages.track --news
	@$(BIN)/python -m mnist_mlp.verdict

study: clone setup  ## train the recipe with many seeds, and describe what comes out
	@$(BIN)/python -m mnist_mlp.params
	@$(BIN)/dvc repro study/dvc.yaml
	@$(BIN)/python -m mnist_mlp.study.record

study-check: clone setup  ## train RUNS (2) of the study's runs again, drawn at random, and compare
	@$(BIN)/python -m mnist_mlp.study.check --runs '$(RUNS)'

test: clone setup  ## lint, check the types and run the quick tests; WITHOUT=recipe leaves out those of our recipe
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m 'not full $(addprefix and not ,$(WITHOUT))'

test-full: clone setup  ## run the other tests, the long ones; WITHOUT=recipe likewise
	@$(BIN)/python -m pytest -m 'full $(addprefix and not ,$(WITHOUT))' || test $$? = 5  # nothing is left to run

verify: clone setup  ## run again what made MODEL (the champion, or models:/NAME/VERSION, a run id, a Git revision), and compare
	@$(BIN)/python -m mnist_mlp.verify $(if $(MODEL),'$(MODEL)')

serve: setup  ## answer on 127.0.0.1 from the champion, on PORT (5001)
	@$(BIN)/python -m mnist_mlp.serve --port '$(PORT)'

track: clone setup  ## make MLflow's record of the present results complete
	@$(BIN)/python -m stages.track

bench: setup  ## time our training loop against the textbook's and against the bare matrix products
	@$(BIN)/python -m tests.benchmark

lock: setup  ## make requirements.txt anew from pyproject.toml
	@$(UV) pip compile --quiet --universal --upgrade --generate-hashes --python-version 3.11 --group dev \
	    --no-emit-index-url --custom-compile-command 'make lock' --output-file requirements.txt pyproject.toml

clone:
	@test ! -e .git || git rev-parse --git-dir >/dev/null
	@git rev-parse --verify --quiet HEAD >/dev/null 2>&1 && test -z "$$(git rev-parse --show-cdup)" || { echo \
	    "This folder is not a Git clone of its own, which DVC and the link from results to commits need. Clone the" \
	    "repository, or type: git init && git add --all && git commit -m 'Start from the archive'" >&2; exit 1; }

# Two set-ups at once would remove each other's .venv. The system lifts the lock with the last process that holds it.
define LOCK
import fcntl, os, sys
lock = os.open("requirements.txt", os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("Another make sets up .venv. Wait until it has finished, then type this again.")
os.set_inheritable(lock, True)
os.execvp(sys.argv[1], sys.argv[1:])
endef
export LOCK

# The scripts in .venv name the folder in which it was made, and work only there. The stamp holds that name.
MADE_IN := $(shell test -x $(BIN)/python && cat .venv/installed 2>/dev/null)
ifeq ($(MADE_IN),$(CURDIR))
PYTHON := $(BIN)/python
else
.PHONY: .venv/installed
NEW := venv
endif

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "'$(PYTHON)' is not" \
	    "Python 3.11 or newer. Install one and name it, such as: make repro PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	    "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c "$$LOCK" $(MAKE) --no-print-directory $(NEW) packages

venv:
	@test ! -s .venv/installed || echo "The .venv here was made in $$(cat .venv/installed), and works only there."
	@rm -rf .venv
	@echo "Setting up .venv: on Linux, 3.3 GB to download and 6.4 GB on disk, mostly PyTorch." \
	    "Then Python compiles it all in silence, for about a minute."
	@$(PYTHON) -m venv .venv

# uv comes from the same hashed file as the rest, and goes into .venv whatever pip's settings say. The .pth file is for
# those who start .venv/bin/python or .venv/bin/dvc without activation, such as cron, an IDE or a notebook: Python in
# .venv finds this folder from anywhere, has its own bin first on PATH, where DVC looks for `python -m stages.NAME`, and
# turns MLflow's telemetry off. The last step writes the stamp: without it, the next `make` begins again.
packages:
	@sed -n '/^uv==/,/^ *# via/p' requirements.txt > .venv/uv.txt
	@PIP_USER=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --target= --prefix="$$(pwd -P)/.venv" \
	    --no-deps --require-hashes --requirement .venv/uv.txt
	@$(UV) pip sync --require-hashes --compile-bytecode --python $(BIN)/python requirements.txt
	@printf '%s\n%s %s\n' ../../../.. 'import os, sys; b = sys.prefix + "/bin:"; os.environ.update(PATH=b +' \
	    'os.environ.get("PATH", os.defpath).removeprefix(b), MLFLOW_DISABLE_TELEMETRY="true")' \
	    > "$$(echo .venv/lib/*/site-packages)/mnist_mlp.pth"
	@pwd -P > .venv/installed
