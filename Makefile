# `make demo` and `make test` each work alone on a fresh machine with Python, pip and a C++ compiler.
# `make gpu-test`, `make gpu-bench` and `make sanitize` use the Python at hand: no network, no virtual environment.

PYTHON ?= python3
VENV ?= .venv
# TORCH="torch==2.11.0" takes another one, and the torchvision that goes with it.
TORCH ?= torch==2.14.1 torchvision==0.29.1
RESULTS ?= results
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
# What to measure: arguments of python -m benchmarks.
BENCH ?= all --quick
# Such as --tools initcheck.
SANITIZE_ARGS ?=

export MAX_JOBS
run := $(VENV)/bin/python
# The tests start ninja and other tools of the environment by name.
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
cxx_files = $(shell find csrc benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test build docs bench lint format gpu-build gpu-test gpu-bench gpu-variants sanitize clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       a timm Swin on a photograph, before and after swinkernels.accelerate'
	@echo 'make test       the tests; those that need a GPU are skipped where there is none'
	@echo 'make build      compile csrc/ in place; rebuilds only what changed'
	@echo 'make docs       the documentation, into site/'
	@echo 'make bench      time this package against what a user has without it; BENCH="all" for everything'
	@echo 'make lint       ruff, mypy and clang-format; make format applies what they would change'
	@echo 'make gpu-test   build for this GPU and run the tests that need one, with python3 as it is'
	@echo 'make gpu-bench  build for this GPU and time the kernels against eager, torch.compile and SDPA'
	@echo 'make gpu-variants  build and time variants of the kernels on this GPU'
	@echo 'make sanitize   run the CUDA kernels under memcheck, racecheck and synccheck of compute-sanitizer'
	@echo 'make clean      remove what was built; the environment $(VENV) stays'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" RESULTS=$(RESULTS) BENCH="$(BENCH)" MAX_JOBS=$(MAX_JOBS)'

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

gpu-build:
	SWINKERNELS_BUILD=cuda $(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	$(PYTHON) tests/cuda/run_on_gpu.py --out $(RESULTS) -- $(PYTEST_ARGS)

gpu-bench: gpu-build
	$(PYTHON) -m benchmarks.gpu_suite --out $(RESULTS)

gpu-variants: gpu-build
	$(PYTHON) -m benchmarks.variants --out $(RESULTS)

sanitize: gpu-build
	$(PYTHON) tests/cuda/sanitize_sweep.py $(SANITIZE_ARGS)

clean:
	rm -rf build dist site *.egg-info swinkernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
