# Every target builds what it needs from a clean checkout: an environment in .venv with the versions
# of constraints.txt, and caches in .cache. Nothing outside the checkout is written or relied on.
#
#   make test                       all checks: what CI runs
#   make docs                       the documentation site, in site/
#   make test-gpu                   the kernels at full size, on a machine with an NVIDIA GPU
#   make test-versions              the tests with other versions of Python, torch and TorchRL
#   make demo                       the tutorial: a recurrent DQN learns; its picture is in demo/
#   make test PYTHON=python3.12     with another interpreter
#   make demo ARGS="--frames 5000"  ARGS goes to the program that the target runs
#
# On Linux, PyPI's torch carries CUDA. Where PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names a place with
# PyTorch's CPU wheels, pip takes the smaller CPU build of the same version.

PYTHON ?= python3
JOBS ?= 2
ARGS :=

VENV := .venv
BIN := $(VENV)/bin
# "3.11.7", or nothing if PYTHON does not run. It is part of the stamp's name: another PYTHON builds
# another environment.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
STAMP := $(VENV)/.python-$(PYTHON_VERSION)
RUN_READY := $(STAMP)-run
DEV_READY := $(STAMP)-dev
# On a terminal pip shows how far a download is: that of torch takes minutes.
INSTALL := $(BIN)/python -m pip install --progress-bar $(if $(MAKE_TERMOUT),on,off) -c constraints.txt

# Caches that tools would put into the home folder or beside the sources.
CACHE := $(CURDIR)/.cache
export PIP_CACHE_DIR ?= $(CACHE)/pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR ?= $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/inductor
export TRITON_CACHE_DIR ?= $(CACHE)/triton
export XDG_CACHE_HOME := $(CACHE)/xdg
# No look at the network for a newer pyright: the bundled one is the pinned one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help check-python env test test-gpu test-versions chaos mutants seeds lint typecheck docs pytest fuzz faults demo learn results bench \
	bench-quick bench-gpu targets format dist clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile
	@echo 'others: env lint typecheck pytest fuzz faults mutants seeds chaos learn results bench bench-quick bench-gpu targets format dist clean'

# Before anything is deleted: one clear line where PYTHON cannot build the environment.
TOO_OLD = $(filter 2.% 3.0.% 3.1.% 3.2.% 3.3.% 3.4.% 3.5.% 3.6.% 3.7.% 3.8.% 3.9.%,$(PYTHON_VERSION))
TESTED = $(filter 3.10.% 3.11.% 3.12.% 3.13.%,$(PYTHON_VERSION))
HAS_VENV = $(shell $(PYTHON) -c 'import ensurepip, venv; print("yes")' 2>/dev/null)
check-python:
	$(if $(PYTHON_VERSION),,$(error PYTHON=$(PYTHON) does not run; name an installed Python, 3.10 or newer))
	$(if $(TOO_OLD),$(error PYTHON=$(PYTHON) is Python $(PYTHON_VERSION); rnnkeys needs 3.10 or newer))
	$(if $(HAS_VENV),,$(error PYTHON=$(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv))

$(RUN_READY): pyproject.toml constraints.txt | check-python
	@echo 'Building .venv with Python $(PYTHON_VERSION): minutes, and gigabytes where torch brings CUDA.'
	$(if $(TESTED),,@echo 'constraints.txt holds versions for Python 3.10 to 3.13: pip may find none for $(PYTHON_VERSION).')
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation -e '.[tutorials]'
	touch $@

$(DEV_READY): $(RUN_READY)
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

env: $(DEV_READY)

# Cheap checks first.
test: lint typecheck docs faults pytest

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(DEV_READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# Warnings, such as those of broken links, are errors; with --quiet they would not be. No network is
# used, here or by readers.
docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --site-dir $(CURDIR)/site

# One thread per worker: two workers with two threads each would fight for two cores.
pytest: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10 $(ARGS)

# Thousands of bad batches for every entry point that takes one, and all bad arguments: 20 minutes.
fuzz: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.fuzz $(ARGS)

faults: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.check_faults --jobs $(JOBS)

# The same tests that interpret the kernels on a CPU run them on the GPU, and more at full size.
# Some ask torch for deterministic algorithms, which its library has with this workspace only. Should
# programs wait for each other for ever, five minutes end it.
test-gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
test-gpu: $(DEV_READY)
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("no CUDA device")'
	env -u TRITON_INTERPRET $(BIN)/python -m pytest tests/backends/test_contract.py tests/support/triton_kernels.py tests/support/triton_linear.py \
		tests/backends/test_precision.py -k "triton or precision" --durations=10 \
		-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true $(ARGS)

# Every lane builds an environment of its own and removes it: gigabytes of downloads, and hours.
test-versions: | check-python
	$(PYTHON) -m scripts.test_versions --jobs $(JOBS) $(ARGS)

# One small change of the package at a time, and the tests that run it: hours. It continues where the
# last call stopped.
mutants: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.mutants --jobs $(JOBS) $(ARGS)
	$(BIN)/python -m scripts.mutants_table

# The tests in random order under 20 seeds: minutes for each. It continues where the last call stopped.
seeds: $(DEV_READY)
	$(BIN)/python -m scripts.seeds --jobs $(JOBS) $(ARGS)

# Runs of the tutorials that are killed, stopped and starved: half an hour.
chaos: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.chaos $(ARGS)

# A second `make demo` continues the run in demo/, or tests it again if it is finished.
demo: $(RUN_READY)
	$(BIN)/python tutorials/recurrent_dqn.py --output demo $(addprefix --resume ,$(wildcard demo/checkpoint.pt)) $(ARGS)

learn: $(RUN_READY)
	$(BIN)/python -m benchmarks.learn $(ARGS)

# Tasks whose results others have published: make results ARGS="t_maze --seeds 0"
results: $(RUN_READY)
	$(BIN)/python -m benchmarks.learn --suite results $(ARGS)

bench: $(RUN_READY)
	$(BIN)/python -m benchmarks.bench_cpu $(ARGS)

bench-quick: $(RUN_READY)
	$(BIN)/python -m benchmarks.bench_cpu --quick $(ARGS)

bench-gpu: $(DEV_READY)
	env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.bench_gpu $(ARGS)

# How wrong the targets of each loss are; needs the tests' cases and nothing that only tests need.
targets: $(RUN_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.targets $(ARGS)

format: $(DEV_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(DEV_READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist demo outputs site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
