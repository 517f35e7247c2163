# `make demo`, `make test`, `make check` and `make lint` each work alone on a fresh machine with Python, pip and a C++
# compiler; each installs what it needs and no more.
# `make gpu-check` and what is part of it use the Python at hand: no network, no virtual environment.

PYTHON ?= python3
VENV ?= .venv
# TORCH="torch==2.11.0" takes another one, and the torchvision that goes with it.
TORCH ?= torch==2.14.1 torchvision==0.29.1
RESULTS ?= results
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PYTEST_ARGS ?=
# What make check compares with.
BASE ?= main
# Which faults, or the beginnings of their names.
FAULTS ?=
# Of test-all: the parts to run, whatever was run before.
PARTS ?=
# What to measure: arguments of python -m benchmarks.
BENCH ?= all --quick
# How many random calls sanitize-cpu makes.
CALLS ?= 10000
# Of gpu-check: seconds (480), the steps (all but two unless named), another _ops library to time beside this one, and 1 to do
# the same without a GPU.
BUDGET ?=
STEPS ?=
AGAINST ?=
REHEARSE ?=

export MAX_JOBS

# CUDA kernels take minutes to compile, on two cores. They are built where there is a GPU, for the tests, with CUDA=1, and
# where an earlier build has them.
CUDA ?= $(if $(or $(shell nvidia-smi -L 2> /dev/null | grep GPU),$(wildcard build/temp.*/csrc/kernels/cuda)),1)
SWINKERNELS_BUILD ?= $(if $(CUDA),auto,cpu)
kernels = $(if $(filter cpu,$(SWINKERNELS_BUILD)),CPU kernels; CUDA=1 adds the CUDA kernels,CPU and CUDA kernels)

run := $(VENV)/bin/python
# The tests start ninja and other tools of the environment by name.
in_venv := PATH="$(abspath $(VENV))/bin:$$PATH"
cxx_files = $(shell find csrc benchmarks examples -name '*.h' -o -name '*.cuh' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

# $(call phase,name,what it does,command): one line, with the seconds that it took. The output goes to build/<name>.log,
# which a failure names after the lines that tell most.
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
	@echo 'make test       the tests; those that need a GPU are skipped where there is none'
	@echo 'make check      lint, types and the tests of what changed since BASE=$(BASE), for at most a minute'
	@echo 'make coverage   the lines of the package and of the CPU kernels that no test runs'
	@echo 'make test-all   all tests and all faults, before a release; writes tests/last_full_run.json, from which it goes on'
	@echo 'make faults     put faults into copies of the sources, each of which a test has to find; FAULTS="cuda-" for some'
	@echo 'make build      compile csrc/ in place; only what changed. CUDA=1: the CUDA kernels without a GPU, too'
	@echo 'make wheel      the wheel of the CPU kernels, and with CUDA=1 that of the CUDA kernels, into dist/'
	@echo 'make docs       the documentation, into site/'
	@echo 'make bench      time this package against what a user has without it; BENCH="all" for everything'
	@echo 'make lint       ruff and clang-format; make format applies what they would change; make types: mypy'
	@echo 'make gpu-check    all that a GPU is to settle, in eight minutes; REHEARSE=1: the same without a GPU'
	@echo 'make gpu-bundle   a folder, bundle/, to carry to a GPU: make gpu-check there needs no compiler'
	@echo 'make gpu-test, gpu-bench, gpu-variants, sanitize   parts of gpu-check, whole and without a time limit'
	@echo 'make sanitize-cpu  run random calls of the CPU kernels under AddressSanitizer and UBSan; CALLS=$(CALLS)'
	@echo 'make clean      remove what was built; the environment $(VENV) stays'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH="$(TORCH)" RESULTS=$(RESULTS) BENCH="$(BENCH)" MAX_JOBS=$(MAX_JOBS)'
	@echo 'Of gpu-check: BUDGET=480 STEPS=smoke,time AGAINST=other/_ops.abi3.so REHEARSE=1'

# Stamps of what is installed, by the torch that was asked for: another TORCH installs it. The linters need none.
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
	$(call phase,install,installing $(TORCH) and what the build and the demo need into $(VENV),\
		$(call install,$(VENV),$(TORCH) --group build --group demo))
	@rm -f $(VENV)/.torch-* && touch $@

$(dev_stamp): $(torch_stamp)
	$(call phase,install-dev,installing what the tests need into $(VENV),$(call install,$(VENV),$(TORCH) --group dev))
	@rm -f $(VENV)/.dev-* && touch $@

$(lint_stamp): pyproject.toml constraints.txt
	$(call phase,install-lint,installing the linters into $(linters),$(call install,$(linters),--group lint))
	@touch $@

# Ninja finds out what changed, so this is always run; without a change it takes seconds.
build: $(torch_stamp)
	$(call phase,compile,compiling csrc/ in place ($(kernels)),\
		$(in_venv) SWINKERNELS_BUILD=$(SWINKERNELS_BUILD) $(run) setup.py build_ext --inplace)

demo: build
	@$(in_venv) $(run) -m swinkernels.demo

# One thread a process: tests of threads set their number, and threads that wait for each other take CPU time, three times
# that of the tests. `long` are sweeps, and what builds or installs for minutes.
test: CUDA = 1
test: $(dev_stamp) build
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m pytest -n auto --maxprocesses 4 --dist worksteal -m 'not long' $(PYTEST_ARGS)

# Writes tests/last_full_run.json, part by part.
test-all: CUDA = 1
test-all: $(dev_stamp) build
	$(call phase,install-interop,installing wheel, export and training tools into $(VENV),$(call install,$(VENV),$(TORCH) --group interop))
	$(in_venv) $(run) -m tests.run_all $(PARTS)

# For this machine's torch. Other CUDA majors: CUDA_HOME and a TORCH built for it.
wheel: $(torch_stamp)
	$(call phase,install-wheel,installing auditwheel into $(VENV),$(call install,$(VENV),$(TORCH) --group wheel))
	$(call phase,wheel-cpu,building the CPU wheel,$(in_venv) $(run) -m release.wheel cpu)
	$(if $(CUDA),$(call phase,wheel-cuda,building the CUDA wheel,$(in_venv) $(run) -m release.wheel cuda))
	@grep -h ' MB' build/wheel-cpu.log $(if $(CUDA),build/wheel-cuda.log)

faults: $(dev_stamp) build
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m tests.faults $(FAULTS)

# Which lines of the package and of the CPU kernels no test runs. It takes longer than the tests; PYTEST_ARGS chooses some.
coverage: $(dev_stamp)
	$(call phase,install-coverage,installing coverage and gcovr into $(VENV),$(call install,$(VENV),--group coverage))
	$(call phase,compile-coverage,compiling the CPU kernels with counters,\
		$(in_venv) SWINKERNELS_BUILD=cpu CFLAGS='-O1 --coverage' LDFLAGS=--coverage $(run) setup.py build_ext --inplace \
			--build-temp build/coverage --build-lib build/coverage)
	@rm -f build/coverage/python.* && find build/coverage -name '*.gcda' -delete
	-$(in_venv) OMP_NUM_THREADS=1 $(run) -m coverage run -m pytest -n auto --dist worksteal -m 'not long' $(PYTEST_ARGS)
	@$(run) -m coverage combine --quiet && $(run) -m coverage report > build/coverage/package.txt
	@$(run) -m gcovr --merge-lines --object-directory build/coverage --filter csrc/kernels/cpu/ > build/coverage/kernels.txt
	@tail -n 1 build/coverage/package.txt && tail -n 2 build/coverage/kernels.txt
	@echo 'The lines: build/coverage/package.txt, build/coverage/kernels.txt'
	@$(MAKE) --no-print-directory build

# The tests stop after half a minute: what is left is skipped, and said.
check: lint types build
	@tests=$$($(run) tests/changed.py --since $(BASE)) && echo "tests: $$tests" && \
	$(in_venv) OMP_NUM_THREADS=1 $(run) -m pytest -n 2 --dist worksteal -q -m 'not slow and not long and not gpu' \
		--seconds 30 $$tests $(PYTEST_ARGS)

# Some pages are written from the sources; see docs/ and mkdocs.yml.
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

# In a folder of its own. Python's own flags make signed overflow wrap, which would hide it. torch does not free all that
# it takes, and throws through a library that has to be there before the first exception.
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
