# Two commands set everything up: `make quickstart` and `make test`. Each creates .venv when it is missing.
# `make sglang` adds .venv-sglang, which holds SGLang's servers; where it exists, tests run against them too.
PYTHON ?= python3
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
BIN := $(VENV)/bin
# Where torch's CPU wheels come from, when the default index would give the CUDA build: make test TORCH_INDEX=<url>
TORCH_INDEX ?=
TORCH := torch==2.13.0
INSTALL := PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" sh requirements/install.sh

.PHONY: install sglang quickstart test lint format benchmark clean

install:
	@VENV="$(VENV)" PINS=requirements/cpu.txt $(INSTALL)

sglang:
	@VENV="$(SGLANG_VENV)" PINS=requirements/sglang.txt $(INSTALL)

quickstart: install
	$(BIN)/megatron-rl quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: install
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
