# Two commands matter: `make quickstart` and `make test`. Each sets the environment up by itself, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/torch.txt requirements/cpu.lock requirements/deepspeed.lock requirements/browser.txt pyproject.toml
STAMP := $(VENV)/.installed
ONE_PROCESS := tests/architecture tests/contract tests/unit

.PHONY: help setup quickstart test test-slow check format clean
.DEFAULT_GOAL := help

help:  ## Show what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(STAMP)  ## Create .venv from the pinned locks (skipped when they have not changed)

$(STAMP): $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements/torch.txt
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements/browser.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation --require-hashes -r requirements/deepspeed.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: setup  ## Train a small language model by RLHF, end to end, on this machine's CPU
	$(BIN)/rondo quickstart

test: setup  ## The default test suite: no network, no GPU
	@# Integration tests start clusters that want both cores: only what fits into one process runs two at a time.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile $(ONE_PROCESS)
	$(BIN)/python -m pytest -m "not slow and not gpu" --durations=20 --durations-min=5 $(ONE_PROCESS:%=--ignore=%)

test-slow: setup  ## The tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu"

check: setup  ## ruff (format and lint) and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup  ## Rewrite the sources in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment (runs/ is left alone)
	rm -rf $(VENV) *.egg-info
