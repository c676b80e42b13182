# make            lists what there is
# make run        from a fresh machine to a tuned model that answers
# make test       everything that is checked before a change goes in
# Options: PYTHON=python3.12 (for setup)   ARGS="--epochs 1" (for run)   WORKERS=2 (notebooks at once)

.DEFAULT_GOAL := help
.PHONY: help setup run test check notebooks pytest lab outputs

BIN := .venv/bin
WORKERS ?= 2
ARGS ?=
export PYTHON

# Notebooks run without progress bars, which would be stored, and without a network.
QUIET := TQDM_DISABLE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 \
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
# Tests: less data, and one thread for each notebook that runs.
QUICK := $(QUIET) INSTRUCT_FT_SCALE=quick OMP_NUM_THREADS=1

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup: ## make .venv with the pinned development set (seconds, when it is there)
	@sh tools/setup.sh

run: setup ## fine-tune the Atlas decoder, compare before and after, write a report to runs/
	@$(BIN)/instruct-ft run $(ARGS)

test: setup ## check, then every notebook, then pytest
	@$(BIN)/python tools/check.py
	@$(QUICK) $(BIN)/nbdev-test --n-workers $(WORKERS)
	@$(QUICK) $(BIN)/python -m pytest

check: setup ## lint, sync, sizes, README, import time, wheel (no notebook is run)
	@$(BIN)/python tools/check.py

notebooks: setup ## run every notebook at scale quick
	@$(QUICK) $(BIN)/nbdev-test --n-workers $(WORKERS) --timing

pytest: setup ## run the tests in tests/
	@$(QUICK) $(BIN)/python -m pytest $(ARGS)

lab: setup ## open the course in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

outputs: setup ## run every notebook at scale full and store what it shows (long)
	@$(QUIET) INSTRUCT_FT_SCALE=full $(BIN)/nbdev-test --n-workers 1 --save --timing
	@$(QUIET) $(BIN)/nbdev-test --save nbs/index.ipynb
	@$(BIN)/nbdev-clean
	@$(BIN)/python tools/readme.py
