# Two commands set everything up: `make quickstart` and `make test`. Each creates .venv when it is missing.
# `make sglang` adds .venv-sglang, which holds SGLang's servers; where it exists, tests run against them too.
# `make te-cpu` adds .te-cpu, Transformer Engine's Python, for tests/te_cpu.
# With a GPU: `make gpu` and `make sglang GPU=1`, with Python 3.12 and CUDA 13 (docs/gpu.md).
PYTHON ?= python3
VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
BIN := $(VENV)/bin
# Where torch's CPU wheels come from, when the default index would give the CUDA build: make test TORCH_INDEX=<url>
TORCH_INDEX ?=
TORCH := torch==2.13.0
GPU ?=
SGLANG_PINS := requirements/sglang$(if $(GPU),-gpu).txt
INSTALL := PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" sh requirements/install.sh

FOLDER := VENV="$(VENV)" sh requirements/folder.sh
NEWEST := PYTHONPATH="$(CURDIR)/.mcore-newest"

PYTEST := $(BIN)/python -m pytest
# How often a failed test that starts processes runs again. The summary shows each failure, also of those that pass then.
RERUNS ?= 0
LANE := $(PYTEST) --reruns $(RERUNS) --rerun-show-tracebacks
# Tests of engines, jobs and single rooms. All others, of whole runs and groups of ranks, take about as long.
ENGINE_TESTS := tests/contract tests/slurm tests/unit

.PHONY: install gpu gpu-tests sglang te-cpu newest-core mcore-ends mbridge quickstart test test-fast test-engines \
  test-runs durations lint format benchmark bench-check soak peers verl-losses walks rooms reference clean

install:
	@VENV="$(VENV)" PINS=requirements/cpu.txt $(INSTALL)

# The trainer on GPUs. Compiles Transformer Engine's extension: needs nvcc and the headers of CUDA 13 and cuDNN.
gpu:
	@VENV="$(VENV)" PINS=requirements/gpu.txt $(INSTALL)

gpu-tests:
	$(BIN)/python -m tests.gpu.run

sglang:
	@VENV="$(SGLANG_VENV)" PINS=$(SGLANG_PINS) $(INSTALL)

te-cpu: install
	@FOLDER=.te-cpu PINS=requirements/te-cpu.txt $(FOLDER)

# Named cases with the newest megatron-core that is allowed; `make test` has the oldest.
newest-core: install
	@FOLDER=.mcore-newest PINS=requirements/newest-core.txt $(FOLDER)
	$(NEWEST) $(LANE) @tests/newest_core.txt

# All tests with both.
mcore-ends: test newest-core
	$(NEWEST) $(PYTEST)

# Conversions compared with those of another library, and its seconds (docs/checkpoints.md).
mbridge: install
	@FOLDER=.mbridge PINS=requirements/mbridge.txt $(FOLDER)
	$(BIN)/python benchmarks/compare_mbridge.py

quickstart: install
	$(BIN)/megatron-rl quickstart

# All tests. Those that start processes run in two lanes: servers, ranks and runs wait for each other half of the time.
# The output of a lane comes when it has ended. The order of tests inside a lane keeps servers and ranks in use.
test: test-fast
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-engines test-runs

test-engines: install
	$(LANE) -m "not fast" $(ENGINE_TESTS)

test-runs: install
	$(LANE) -m "not fast" $(ENGINE_TESTS:%=--ignore=%)

# Unit tests that start no process.
test-fast: install
	$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder tests/unit -m fast

# All tests, and tests/durations.md: seconds of each folder, and the slowest tests.
durations:
	$(MAKE) --no-print-directory test PYTEST="$(PYTEST) -p tests.durations"

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

# Ratios of the quick benchmarks against benchmarks/baseline.json.
bench-check: install
	$(BIN)/python benchmarks/check.py

# A run of 600 steps whose processes must not grow.
soak: install
	$(BIN)/python benchmarks/soak.py

# Steps of this trainer and of TRL's, in turns, on the model of `make quickstart`.
peers: install
	@VENV=.venv-peers PINS=requirements/peers.txt $(INSTALL)
	$(BIN)/python benchmarks/peers.py --trl .venv-peers/bin/python

# Objectives and verl's functions of the same name, in turns.
verl-losses: install
	@FOLDER=.verl PINS=requirements/verl.txt $(FOLDER)
	OMP_NUM_THREADS=1 PYTHONPATH=.verl $(BIN)/python benchmarks/verl_losses.py

# The map of rooms in docs/design.md, and the hand-overs of three walks through them.
rooms: install
	$(BIN)/python benchmarks/rooms.py

walks: install
	$(BIN)/python benchmarks/walks.py

# docs/reference: every key of the configuration, and every key of the run log.
reference: install
	$(BIN)/python -m megatron_rl.reference

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
