# `make demo` and `make test` each work alone on a fresh machine with Python, pip and a C++ compiler.
# `make gpu-check` and what is part of it use the Python at hand: no network, no virtual environment.

PYTHON ?= python3
VENV ?= .venv
# TORCH="torch==2.11.0" takes another one, and the torchvision that goes with it.
TORCH ?= torch==2.14.1 torchvision==0.29.1
RESULTS ?= results
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
# What to measure: arguments of python -m benchmarks.
BENCH ?= all --quick
# Of gpu-check: seconds (480), the steps (all but two unless named), another _ops library to time beside this one, and 1 to do
# the same without a GPU.
BUDGET ?=
STEPS ?=
AGAINST ?=
REHEARSE ?=

export MAX_JOBS
run := $(VENV)/bin/python
# The tests start ninja and other tools of the environment by name.
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
cxx_files = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test build docs bench lint format gpu-check gpu-bundle gpu-test gpu-bench gpu-variants sanitize clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       a timm Swin on a photograph, before and after swinkernels.accelerate'
	@echo 'make test       the tests; those that need a GPU are skipped where there is none'
	@echo 'make build      compile csrc/ in place; rebuilds only what changed'
	@echo 'make docs       the documentation, into site/'
	@echo 'make bench      time this package against what a user has without it; BENCH="all" for everything'
	@echo 'make lint       ruff, mypy and clang-format; make format applies what they would change'
	@echo 'make gpu-check    all that a GPU is to settle, in eight minutes; REHEARSE=1: the same without a GPU'
	@echo 'make gpu-bundle   a folder, bundle/, to carry to a GPU: make gpu-check there needs no compiler'
	@echo 'make gpu-test, gpu-bench, gpu-variants, sanitize   parts of gpu-check, whole and without a time limit'
	@echo 'make clean      remove what was built; the environment $(VENV) stays'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" RESULTS=$(RESULTS) BENCH="$(BENCH)" MAX_JOBS=$(MAX_JOBS)'
	@echo 'Of gpu-check: BUDGET=480 STEPS=smoke,time AGAINST=other/_ops.abi3.so REHEARSE=1'

# Stamps of the tools and of the wish for a torch: asking for another TORCH installs it.
torch_stamp := $(VENV)/.torch-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.\n' '-')

$(torch_stamp): pyproject.toml constraints.txt
	test -x $(run) || $(PYTHON) -m venv $(VENV)
	$(run) -m pip install --quiet --upgrade 'pip>=25.1'
	$(run) -m pip install --progress-bar off $(TORCH) --group dev --constraint constraints.txt
	rm -f $(VENV)/.torch-*
	touch $@

# Ninja finds out what changed, so this is always run; without a change it takes seconds.
build: $(torch_stamp)
	$(in_venv) $(run) setup.py build_ext --inplace

demo: build
	$(in_venv) $(run) -m swinkernels.demo

# Two threads a process: the threading of the CPU kernels is tested without processes crowding each other out.
test: build
	$(in_venv) OMP_NUM_THREADS=2 $(run) -m pytest -n auto --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

# Some pages are written from the sources; see docs/ and mkdocs.yml.
docs: $(torch_stamp)
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict

bench: build
	$(in_venv) $(run) -m benchmarks $(BENCH)

lint: $(torch_stamp)
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cxx_files)

format: $(torch_stamp)
	$(run) -m ruff check --fix .
	$(run) -m ruff format .
	$(VENV)/bin/clang-format -i $(cxx_files)

gpu := $(PYTHON) -m gpu check --out $(RESULTS) --against "$(AGAINST)" $(if $(REHEARSE),--rehearse)

gpu-check:
	$(gpu) $(if $(BUDGET),--budget $(BUDGET)) $(if $(STEPS),--steps $(STEPS))

# For sm_90 unless TORCH_CUDA_ARCH_LIST says otherwise: three architectures would be more than 40 MiB.
gpu-bundle:
	SWINKERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0}" $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m gpu bundle

gpu-test:
	PYTEST_ARGS="$(PYTEST_ARGS)" $(gpu) --whole --steps info,tests

gpu-bench:
	$(gpu) --whole --steps info,time,peers,models

gpu-variants:
	$(PYTHON) -m gpu variants
	$(gpu) --whole --steps info,variants

sanitize:
	$(gpu) --whole --steps info,sanitize

clean:
	rm -rf build bundle dist site *.egg-info swinkernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
