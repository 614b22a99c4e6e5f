# Every target sets up what it needs: Python 3.11 or 3.12 and make are enough.
PYTHON ?= python3
OUT ?= runs/demo
# One thread per process: the demo and the tests start several processes.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_READY := $(VENV)/.demo-ready
DEV_READY := $(VENV)/.dev-ready

.DEFAULT_GOAL := help
.PHONY: help venv demo experiment experiment-full test test-full check clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=python3.12 chooses the interpreter; make demo OUT=DIR the folder."

venv: $(DEMO_READY) ## make .venv with what the demo needs

demo: $(DEMO_READY) ## pretrain, SOAR, export, compare: pictures and a table in OUT (runs/demo)
	$(BIN)/python tools/demo.py --out "$(OUT)"

experiment: $(DEMO_READY) ## SOAR against SFT and its controls: tables and plots in runs/experiment
	$(BIN)/python tools/experiment.py

experiment-full: $(DEMO_READY) ## the same with the ablations
	$(BIN)/python tools/experiment.py --ablations

test: check ## static checks and the tests, about 55 minutes on 2 cores
	$(BIN)/python -m pytest -m "not full" --durations=40

test-full: check ## static checks and all tests, the long matrices too
	$(BIN)/python -m pytest

check: $(DEV_READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 13))' || { \
	  echo "make: $(PYTHON) is not Python 3.11 or 3.12 (it is: $$($(PYTHON) --version 2>&1));" \
	    "name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[demo]'
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(DEMO_READY)
