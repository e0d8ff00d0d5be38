# `make` alone lists the commands. All of them work in .venv, which they set up when it is missing or out of date.
PYTHON ?= python3
MODEL ?= models:/mnist-mlp@champion
BIN := .venv/bin
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro test verify serve bench lock

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/installed  ## set up .venv from requirements.txt

repro: setup  ## run what is due of the pipeline, and say what came out
	@python -m stages.params
	@dvc repro
	@python -m stages.summary

test: setup  ## lint, check the types and run the tests
	@ruff check
	@ruff format --check
	@mypy
	@python -m pytest

verify: setup  ## run again what made MODEL (the champion, or models:/NAME/VERSION, or a run id), and compare
	@python -m stages.verify '$(MODEL)'

serve: setup  ## answer on 127.0.0.1:5001 from the champion
	@python -m stages.serve

bench: setup  ## time our training loop against the textbook's and against the bare matrix products
	@python -m tests.benchmark

lock: setup  ## make requirements.txt anew from pyproject.toml
	@uv pip compile --quiet --universal --upgrade --generate-hashes --python-version 3.11 --group dev \
	    --no-emit-index-url --custom-compile-command 'make lock' --output-file requirements.txt pyproject.toml

# uv comes from the same hashed file as all the rest. The activation script gets the one setting that
# the mlflow command takes from nowhere else.
.venv/installed: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed -n '/^uv==/,/^ *# via/p' requirements.txt > .venv/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement .venv/uv.txt
	@$(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python requirements.txt
	@grep -q MLFLOW_DISABLE_TELEMETRY $(BIN)/activate || echo 'export MLFLOW_DISABLE_TELEMETRY=true' >> $(BIN)/activate
	@touch $@
