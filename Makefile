# Two commands set everything up: `make quickstart` and `make test`. Each creates .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where torch's CPU wheels come from, when the default index would give the CUDA build: make test TORCH_INDEX=<url>
TORCH_INDEX ?=
TORCH := torch==2.13.0
STAMP := $(VENV)/installed.sha256

.PHONY: install quickstart test lint format benchmark clean

install:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" STAMP="$(STAMP)" sh requirements/install.sh

quickstart: install
	$(BIN)/megatron-rl quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: install
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
