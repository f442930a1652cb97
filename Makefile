# Every target builds what it needs from a clean checkout: an environment in .venv with the versions
# of constraints.txt, and caches in .cache. Nothing outside the checkout is written or relied on.
#
#   make test                       all checks: what CI runs
#   make test-gpu                   the kernels at full size, on a machine with an NVIDIA GPU
#   make demo                       the tutorial: a recurrent DQN learns; its picture is in demo/
#   make test PYTHON=python3.12     with another interpreter
#
# On Linux, PyPI's torch carries CUDA. Where PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names a place with
# PyTorch's CPU wheels, pip takes the smaller CPU build of the same version.

PYTHON ?= python3
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The version is part of the stamp's name: another PYTHON builds another environment.
STAMP := $(VENV)/.python-$(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
RUN_READY := $(STAMP)-run
DEV_READY := $(STAMP)-dev

CACHE := $(CURDIR)/.cache
export PIP_CACHE_DIR ?= $(CACHE)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR ?= $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/inductor
export TRITON_CACHE_DIR ?= $(CACHE)/triton
# No look at the network for a newer pyright: the bundled one is the pinned one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help env test test-gpu lint typecheck pytest faults demo learn bench bench-quick bench-gpu targets format dist clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile
	@echo 'others: env lint typecheck pytest faults learn bench bench-quick bench-gpu targets format dist clean'

$(RUN_READY): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[tutorials]'
	touch $@

$(DEV_READY): $(RUN_READY)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

env: $(DEV_READY)

test: lint typecheck pytest faults

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(DEV_READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread per worker: two workers with two threads each would fight for two cores.
pytest: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10 $(PYTEST_ARGS)

faults: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.check_faults --jobs $(JOBS)

# The same tests that interpret the kernels on a CPU run them on the GPU, and more at full size.
# Some ask torch for deterministic algorithms, which its library has with this workspace only. Should
# programs wait for each other for ever, five minutes end it.
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: $(DEV_READY)
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("no CUDA device")'
	env -u TRITON_INTERPRET $(BIN)/python -m pytest tests/backends/test_contract.py tests/support/triton_kernels.py \
		tests/backends/test_precision.py -k "triton or precision" --durations=10 \
		-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true $(PYTEST_ARGS)

demo: $(RUN_READY)
	$(BIN)/python tutorials/recurrent_dqn.py --output demo $(DEMO_ARGS)

learn: $(RUN_READY)
	$(BIN)/python -m benchmarks.learn $(BENCH_ARGS)

bench: $(RUN_READY)
	$(BIN)/python -m benchmarks.bench_cpu $(BENCH_ARGS)

bench-quick: $(RUN_READY)
	$(BIN)/python -m benchmarks.bench_cpu --quick $(BENCH_ARGS)

bench-gpu: $(DEV_READY)
	env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.bench_gpu $(BENCH_ARGS)

# How wrong the targets of each loss are; needs the tests' cases and nothing that only tests need.
targets: $(RUN_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.targets $(BENCH_ARGS)

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(DEV_READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist demo *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
