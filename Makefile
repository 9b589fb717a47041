# Everything runs in an environment of its own, made on first use and again when pyproject.toml or constraints.txt change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
DATA ?= scenes
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
GPU_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv peers test test-cluster gpu gpu-wheels lint format type demo clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## set up .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt tests/golden/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; give another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV) and installing the pinned versions (2 to 5 minutes, about 2 GB; pip prints nothing until the end)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,plots,demo]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --target $(VENV)/peers/mistral-common \
		--requirement tests/golden/requirements.txt
	@touch $@

peers: $(STAMP) ## other systems that exported models are tested with (CPython 3.11, x86-64)
	for peer in transformers-4.57 cyllama; do \
		$(BIN)/python -m pip install --quiet --no-deps --require-hashes --upgrade --target $(VENV)/peers/$$peer \
			--requirement tests/deploy/$$peer.txt; \
	done

test: lint type ## lint, type check, then every test (PYTEST_ARGS="-n 2")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-cluster: $(STAMP) ## SLURM, torchrun and DeepSpeed on two test hosts (root on Debian; installs packages)
	bash tests/cluster/run.sh $(BIN)/python

gpu: ## measure a GPU in pieces, with the python of the environment that is active (GPU_ARGS=--rehearse)
	$(PYTHON) tests/benchmarks/gpu.py $(GPU_ARGS)

gpu-wheels: $(STAMP) ## gather wheels for a GPU machine without network in gpu-wheels/ (GPU_ARGS="--python 3.12")
	$(BIN)/python tests/benchmarks/gpu_wheels.py $(GPU_ARGS)

lint: $(STAMP) ## ruff: rules, docstrings and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(STAMP) ## mypy, strict, over the package and pipelines/
	$(BIN)/mypy

demo: $(STAMP) ## the whole job on real weights (DATA=scenes|stamps, DEMO_ARGS=--short)
	$(BIN)/python -m pipelines.demo --data $(DATA) $(DEMO_ARGS)

clean: ## remove the environment and everything that tools left behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
