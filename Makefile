# `make demo`, `make test`, `make check` and `make lint` each work on a fresh machine with Python, pip and a C++
# compiler, and install only their own requirements. `make gpu-check` and its parts use the current Python, and need
# neither a network nor a virtual environment.

PYTHON ?= python3
VENV ?= .venv
# TORCH="torch==2.11.0" installs another version, with the matching torchvision.
TORCH ?= torch==2.14.1 torchvision==0.29.1
RESULTS ?= results
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
# The tests that `make coverage` runs.
TESTS ?= $(patsubst %/,%,$(sort $(dir $(wildcard tests/*/test_*.py))))
# The branch or commit that `make check` compares the working tree with.
BASE ?= main
# The faults that `make faults` inserts, by name or prefix; all of them by default.
FAULTS ?=
# The parts that `make test-all` runs, passed before or not; by default those that have not passed at this commit.
PARTS ?=
# The arguments of `python -m benchmarks` in `make bench`.
BENCH ?= all --quick
# The number of random calls in `make sanitize-cpu`.
CALLS ?= 10000
# For `make gpu-check`: BUDGET is the time limit in seconds (480 by default), STEPS lists the steps (by default all but
# three), AGAINST is the path of another `_ops` library to compare times with, and REHEARSE=1 runs the steps without a
# GPU.
BUDGET ?=
STEPS ?=
AGAINST ?=
REHEARSE ?=

export MAX_JOBS

# CUDA kernels take minutes to compile on two cores. They are built if the machine has a GPU, if an earlier build
# contains them, or if CUDA=1, which `make test` and `make test-all` set.
CUDA ?= $(if $(or $(shell nvidia-smi -L 2> /dev/null | grep GPU),$(wildcard build/temp.*/csrc/kernels/cuda)),1)
SWINKERNELS_BUILD ?= $(if $(CUDA),auto,cpu)
kernels = $(if $(filter cpu,$(SWINKERNELS_BUILD)),CPU kernels; CUDA=1 adds the CUDA kernels,CPU and CUDA kernels)

run := $(VENV)/bin/python
# The tests start ninja and other tools of the environment by name.
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
cxx_files = $(shell find csrc benchmarks examples -name '*.h' -o -name '*.cuh' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

# $(call phase,name,description,command) runs the command and prints one line with the seconds taken. The output goes to
# build/<name>.log; after a failure, the log's most relevant lines and its path are shown.
define phase
@mkdir -p build; printf '%s ... ' '$(2)'; start=$$(date +%s); \
if { $(3); } > build/$(1).log 2>&1; then echo "$$(($$(date +%s) - start)) s"; else \
	echo failed; grep -iE '(error|swinkernels):' build/$(1).log | cut -c 1-300 | head -n 20 || true; \
	tail -n 5 build/$(1).log | cut -c 1-300; echo 'The whole output: build/$(1).log'; exit 1; fi
endef

.PHONY: help demo test test-all faults check coverage build wheel docs bench lint types format gpu-check gpu-bundle gpu-test gpu-bench gpu-variants sanitize sanitize-cpu clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo       a timm Swin on a photograph, before and after swinkernels.accelerate'
	@echo 'make test       the tests; those that need a GPU are skipped without one'
	@echo 'make check      lint, types and the tests of files changed since BASE=$(BASE), in at most a minute'
	@echo 'make coverage   the lines of the package and of the CPU kernels that no test runs'
	@echo 'make test-all   all tests and all faults, before a release; resumes from tests/last_full_run.json'
	@echo 'make faults     insert faults into copies of the sources; a test must detect each; FAULTS="cuda-" for some'
	@echo 'make build      compile changed sources of csrc/ in place; CUDA=1: the CUDA kernels even without a GPU'
	@echo 'make wheel      the wheel of the CPU kernels and, with CUDA=1, the wheel of the CUDA kernels, into dist/'
	@echo 'make docs       the documentation, into site/'
	@echo 'make bench      time this package and its alternatives; BENCH="all" for everything'
	@echo 'make lint       ruff and clang-format; make format: apply their changes; make types: mypy'
	@echo 'make gpu-check    all checks that need a GPU, in eight minutes; REHEARSE=1: the same without a GPU'
	@echo 'make gpu-bundle   a folder, bundle/, to copy to a machine with a GPU: make gpu-check needs no compiler there'
	@echo 'make gpu-test, gpu-bench, gpu-variants, sanitize   parts of gpu-check, complete and without a time limit'
	@echo 'make sanitize-cpu  run random calls of the CPU kernels under AddressSanitizer and UBSan; CALLS=$(CALLS)'
	@echo 'make clean      remove all build results; the environment $(VENV) stays'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" RESULTS=$(RESULTS) BENCH="$(BENCH)" MAX_JOBS=$(MAX_JOBS)'
	@echo 'For gpu-check: BUDGET=480 STEPS=smoke,time AGAINST=other/_ops.abi3.so REHEARSE=1'

# Stamp files of the installed packages, one per TORCH, so that a change of TORCH triggers an installation. The linters
# do not need torch.
torch_name := $(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.\n' '-')
torch_stamp := $(VENV)/.torch-$(torch_name)
dev_stamp := $(VENV)/.dev-$(torch_name)
linters := $(VENV)-lint
lint_stamp := $(linters)/.installed
# $(call install,folder,packages)
install = { test -x $(1)/bin/python || $(PYTHON) -m venv $(1); } && \
	$(1)/bin/python -m pip install --upgrade "pip>=25.1" && \
	$(1)/bin/python -m pip install --progress-bar off $(2) --constraint constraints.txt

$(torch_stamp): pyproject.toml constraints.txt
	$(call phase,install,installing $(TORCH) and packages for build and demo into $(VENV),\
		$(call install,$(VENV),$(TORCH) --group build --group demo))
	@rm -f $(VENV)/.torch-* && touch $@

$(dev_stamp): $(torch_stamp)
	$(call phase,install-dev,installing packages for the tests into $(VENV),$(call install,$(VENV),$(TORCH) --group dev))
	@rm -f $(VENV)/.dev-* && touch $@

$(lint_stamp): pyproject.toml constraints.txt
	$(call phase,install-lint,installing the linters into $(linters),$(call install,$(linters),--group lint))
	@touch $@

# The recipe always runs, because ninja detects changes; without changes it takes seconds.
build: $(torch_stamp)
	$(call phase,compile,compiling csrc/ in place ($(kernels)),\
		$(in_venv) SWINKERNELS_BUILD=$(SWINKERNELS_BUILD) $(run) setup.py build_ext --inplace)

demo: build
	@$(in_venv) $(run) -m swinkernels.demo

# One OpenMP thread per process: threads that wait for each other triple the CPU time of the tests. Tests of threading
# set the number themselves. `long` marks sweeps, and tests that build or install for minutes.
test: CUDA = 1
test: $(dev_stamp) build
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m pytest -n auto --maxprocesses 4 --dist worksteal -m 'not long' $(PYTEST_ARGS)

# Records each part's results in tests/last_full_run.json.
test-all: CUDA = 1
test-all: $(dev_stamp) build
	$(call phase,install-interop,installing packages for the interop tests into $(VENV),$(call install,$(VENV),$(TORCH) --group interop))
	$(in_venv) $(run) -m tests.run_all $(PARTS)

# Builds for this machine's torch. For another major version of CUDA, set CUDA_HOME to its toolkit and TORCH to a torch
# that was built with it.
wheel: $(torch_stamp)
	$(call phase,install-wheel,installing auditwheel into $(VENV),$(call install,$(VENV),$(TORCH) --group wheel))
	$(call phase,wheel-cpu,building the CPU wheel,$(in_venv) $(run) -m release.wheel cpu)
	$(if $(CUDA),$(call phase,wheel-cuda,building the CUDA wheel,$(in_venv) $(run) -m release.wheel cuda))
	@grep -h ' MB' build/wheel-cpu.log $(if $(CUDA),build/wheel-cuda.log)

faults: $(dev_stamp) build
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m tests.faults $(FAULTS)

# Lists the lines of the package and the CPU kernels that no test runs. This takes longer than `make test`; TESTS
# selects a subset of the tests. Each folder runs in a separate process, because pytest-xdist kills workers that take
# seconds to write their coverage counters.
coverage: $(dev_stamp)
	$(call phase,install-coverage,installing coverage and gcovr into $(VENV),$(call install,$(VENV),--group coverage))
	$(call phase,compile-coverage,compiling the CPU kernels with counters,\
		$(in_venv) SWINKERNELS_BUILD=cpu CFLAGS='-O1 --coverage' LDFLAGS=--coverage $(run) setup.py build_ext --inplace \
			--build-temp build/coverage --build-lib build/coverage)
	@rm -f build/coverage/python.* && find build/coverage -name '*.gcda' -delete
	-@printf '%s\n' $(TESTS) | $(in_venv) OMP_NUM_THREADS=1 xargs -P $(MAX_JOBS) -I {} \
		$(run) -m coverage run -m pytest -q -p no:cacheprovider -m 'not long' {} $(PYTEST_ARGS)
	@$(run) -m coverage combine --quiet && $(run) -m coverage report > build/coverage/package.txt
	@$(run) -m gcovr --merge-lines --object-directory build/coverage --filter csrc/kernels/cpu/ \
		--gcov-ignore-parse-errors=suspicious_hits.warn_once_per_file > build/coverage/kernels.txt
	@tail -n 1 build/coverage/package.txt && tail -n 2 build/coverage/kernels.txt
	@echo 'The lines: build/coverage/package.txt, build/coverage/kernels.txt'
	@$(MAKE) --no-print-directory build

# After 30 seconds no further test starts; the remaining tests are skipped and reported.
check: lint types build
	@tests=$$($(run) tests/changed.py --since $(BASE)) && echo "tests: $$tests" && \
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m pytest -n 2 --dist worksteal -q -m 'not slow and not long and not gpu' \
		--seconds 30 $$tests $(PYTEST_ARGS)

# Some pages are generated from the sources; see docs/ and mkdocs.yml.
docs: $(dev_stamp)
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict

bench: $(dev_stamp) build
	$(in_venv) $(run) -m benchmarks $(BENCH)

lint: $(lint_stamp)
	$(linters)/bin/ruff check .
	$(linters)/bin/ruff format --check .
	@echo clang-format; $(linters)/bin/clang-format --dry-run -Werror $(cxx_files)

types: $(dev_stamp)
	$(run) -m mypy

format: $(lint_stamp)
	$(linters)/bin/ruff check --fix .
	$(linters)/bin/ruff format .
	@echo clang-format; $(linters)/bin/clang-format -i $(cxx_files)

gpu := $(PYTHON) -m gpu check --out $(RESULTS) --against "$(AGAINST)" $(if $(REHEARSE),--rehearse)

gpu-check:
	$(gpu) $(if $(BUDGET),--budget $(BUDGET)) $(if $(STEPS),--steps $(STEPS))

# Builds for sm_90 unless TORCH_CUDA_ARCH_LIST is set. A bundle larger than 40 MiB is an error.
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

# Builds in a separate folder. Python's compiler flags make signed overflow wrap, so that UBSan does not report it;
# hence -fno-wrapv. Leaks are not detected, because torch does not free all memory. libstdc++ must be loaded before the
# first exception.
sanitizers := -fsanitize=address,undefined
sanitized := $(sanitizers) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fno-wrapv
cxx_library = $(shell $(or $(CXX),c++) -print-file-name=$(1))
sanitize-cpu: $(torch_stamp)
	$(in_venv) SWINKERNELS_BUILD=cpu LDFLAGS='$(sanitizers)' CFLAGS='$(sanitized)' CXXFLAGS='$(sanitized)' \
		$(run) setup.py build --build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD='$(call cxx_library,libasan.so) $(call cxx_library,libstdc++.so)' ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized/lib:. \
		$(run) tests/cpu/random_cases.py --no-compare --cases $(CALLS)

clean:
	rm -rf build bundle dist site *.egg-info swinkernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
