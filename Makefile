# The two that a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
#
# Variables, e.g. `make test TORCH=torch==2.11.0 PYTHON=python3.12`:
#   PYTHON  the Python that .venv is made with          TORCH  what pip is asked for as PyTorch
#   RESULT  where bench and programs write their results (out/bench.json, out/programs.json), and figures reads one
#   ARGS    further arguments of the program that a target runs (demo, test, bench, check)
#   LIBRARY_ARGS  of `make library` (--isas, --cxx, --out, --sanitize: tools/build_library.py)
#   JOBS    processes that share the tests (test, test-asan): as many as there are processors; those of several threads
#           follow, by themselves. JOBS=1: one after the other in one process, for debugging

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RESULT ?= out/bench.json
ARGS ?=
# A debugger works in one process only.
JOBS ?= $(if $(filter --pdb --trace,$(ARGS)),1,$(shell nproc))
GPU_PYTHON ?= python3

SHELL := /bin/bash
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check
export CXX ?= g++

# A stamp's name holds what it stands for, so that another PyTorch or another list of packages makes it anew.
ENVIRONMENT_KEY := $(shell { echo '$(TORCH)'; cat requirements-dev.txt; } | sha256sum | cut -c1-12)
ENVIRONMENT := $(VENV)/.environment-$(ENVIRONMENT_KEY)
BUILT := $(VENV)/.built-$(ENVIRONMENT_KEY)
INSTALLED := $(VENV)/.installed-$(ENVIRONMENT_KEY)

PROGRAMS_VENV ?= .venv-programs
PROGRAMS := $(PROGRAMS_VENV)/.installed-$(shell { echo '$(TORCH)'; cat benchmarks/requirements-programs.txt; } | sha256sum | cut -c1-12)

PEERS := $(VENV)/.peers-$(ENVIRONMENT_KEY)-$(shell sha256sum benchmarks/requirements.txt | cut -c1-12)

.PHONY: demo test site build library realtime fuzz lint format check bench programs figures browser arm-tools info test-asan other-sets cuda-compile cuda-cycles cuda-link gpu wheel clean help
.DEFAULT_GOAL := help

demo: build  ## train a character model on fused kernels beside torch.nn's (ARGS="--cell gru --text FILE")
	$(RUN) examples/char_lm.py $(ARGS)

# $(call run_tests,command that pytest's arguments follow,files,those that hold tests marked alone,marker expression).
# Status 5: there was none of these tests.
define run_tests
	$(if $(PARALLEL),$(1) $(2) -m '$(if $(4),$(4) and )not alone' -n $(JOBS) --dist worksteal $(ARGS) || test $$? = 5)
	$(if $(PARALLEL),$(1) $(3) -m '$(if $(4),$(4) and )alone' $(ARGS) || test $$? = 5,$(1) $(2) $(if $(4),-m $(4)) $(ARGS))
endef
# All tests need not be collected once more for these; tests/conftest.py sees to it that none is elsewhere.
ALONE_TESTS = $(shell grep -lE 'mark[.]alone|\<threads: None' tests/test_*.py)
PARALLEL := $(filter-out 1,$(JOBS))

test: build  ## run the tests on all processors (ARGS="-k lstm"; JOBS=1: in one process)
	$(call run_tests,$(RUN) -m pytest,tests,$(ALONE_TESTS))

site: build  ## write the documentation as a site, build/site/index.html
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/site

# Instrumented kernels, apart from the normal build. Python itself is not instrumented, so the sanitizers' runtimes have
# to be there first; leaks are not looked for, because Python and PyTorch never free much of what they allocate. The
# report goes past pytest (--capture=sys), because the process ends at the first fault.
ASAN_BUILD := build/sanitize
# The kernels of all instruction sets are one source: without vectors, and with the widest that this processor has, it
# is checked well enough.
comma := ,
ASAN_ISAS := portable,$(if $(shell grep -sw avx512_bf16 /proc/cpuinfo),avx512$(comma)avx512_bf16,avx2)
# Those that hold some of these tests: under a sanitizer the mere collection of all takes most of a minute.
ASAN_TESTS = $(shell grep -l 'mark[.]asan' tests/test_*.py)
ASAN_LIBRARIES = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(library)))
ASAN_ENVIRONMENT = LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH="$$(echo $(ASAN_BUILD)/lib.*)"

test-asan: build  ## the tests marked asan, on kernels with address and undefined-behaviour sanitizers
	FUSED_RNN_SANITIZE=address,undefined FUSED_RNN_ISAS=$(ASAN_ISAS) \
		$(RUN) setup.py --quiet build --build-base $(ASAN_BUILD)
	$(call run_tests,$(ASAN_ENVIRONMENT) $(BIN)/pytest --capture=sys,$(ASAN_TESTS),$(filter $(ALONE_TESTS),$(ASAN_TESTS)),asan)

build: $(BUILT) $(INSTALLED)  ## create .venv with PyTorch in it, compile what changed

check: build  ## compare the kernels with the reference on this machine, under a minute
	$(RUN) -m fused_rnn check $(ARGS)

bench: build $(PEERS)  ## time the kernels against torch.nn, ONNX Runtime, OpenVINO (ARGS=--quick for under a minute)
	$(RUN) -m fused_rnn bench --json $(RESULT) --markdown $(RESULT:.json=.md) $(ARGS)

# Built by `build` for the same Python and PyTorch, so imported from this folder.
programs: RESULT = out/programs.json
programs: build $(PROGRAMS)  ## run other packages' programs with fused layers: numbers, then times (ARGS="--only darts")
	$(PROGRAMS_VENV)/bin/python -m benchmarks.programs --json $(RESULT) $(ARGS)

figures: build  ## tables, images and docs/results.html from a result (RESULT=benchmarks/results/NAME.json)
	$(RUN) benchmarks/plot.py $(RESULT) --out docs/images
	$(RUN) benchmarks/tables.py $(RESULT)
	$(RUN) benchmarks/page.py

browser:  ## Chromium, in which tests look at docs/results.html: from Debian, as root, where there is none
	@$(PYTHON) tools/get_browser.py

arm-tools:  ## a compiler and an emulator for tests of kernels for 64-bit Arm: from Debian, as root, where there is none
	@$(PYTHON) tools/get_arm_tools.py

# CUDA. The first two need nvcc alone, the third nvcc and a gigabyte of downloads, the fourth a GPU and a PyTorch for it.
other-sets:  ## compile the kernels that this processor does not run, for their errors alone
	$(PYTHON) tools/processor_sets.py --others

cuda-compile:  ## compile the CUDA kernels for all architectures: registers, shared memory, spills (ARGS="--arch 90a")
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) tools/cuda_compile.py $(ARGS)

cuda-cycles: $(ENVIRONMENT)  ## cycles of a step from machine code, against those committed (ARGS=--write after a change)
	$(RUN) tools/cuda_cycles.py $(or $(ARGS),--check)

cuda-link: $(ENVIRONMENT)  ## compile and link everything against a CUDA build of PyTorch; needs no GPU
	$(RUN) tools/cuda_link.py $(ARGS)

gpu:  ## on a GPU machine: everything that only it can show, in runs/gpu (docs/on-a-gpu.md; GPU_PYTHON has PyTorch)
	$(GPU_PYTHON) tools/gpu.py $(ARGS)

library:  ## build/library: the C library of streams, without PyTorch (PREFIX=/usr/local installs it; docs/c-library.md)
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) tools/build_library.py $(if $(PREFIX),--prefix $(PREFIX)) $(LIBRARY_ARGS)

realtime: library  ## sound through a GRU in blocks, from C: deadlines missed, times (ARGS="--block 128 --seconds 5")
	$(CC) -std=c11 -O2 examples/realtime.c -Ibuild/library/include build/library/lib/libfused_rnn.a -lm -o build/realtime
	build/realtime $(ARGS)

# The reader of files of weights, which come from anywhere, on files that were changed at random.
FUZZ_SECONDS ?= 300
fuzz:  ## changed files of weights for the C library under the sanitizers (FUZZ_SECONDS=300)
	@mkdir -p build
	$(CXX) -std=c++17 -g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -Iinclude -Icsrc \
		tests/c_library/fuzz_file.cpp csrc/library/{file,description,errors}.cpp -o build/fuzz_file
	build/fuzz_file $(FUZZ_SECONDS) $$(date +%s) tests/data/c_library/*.safetensors

info: build  ## versions, how it was built, instruction sets, threads, CUDA
	$(RUN) -m fused_rnn info $(ARGS)

CXX_FILES = $(shell find csrc include examples tests/arm tests/c_library tests/cuda_host tests/data tests/tiles tools benchmarks \
	-name '*.h' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')

lint: $(ENVIRONMENT)  ## ruff, mypy, clang-format: report only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(ENVIRONMENT)  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(ENVIRONMENT)  ## dist/*.whl and dist/*.tar.gz
	rm -rf build/lib.* build/bdist.*
	$(RUN) -m build --no-isolation

clean:  ## remove everything that was built, but keep .venv
	rm -rf build dist *.egg-info fused_rnn/*.so $(VENV)/.built-* $(VENV)/.installed-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(ENVIRONMENT):
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not found: install Python 3.10 or newer, or name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) tools/prerequisites.py
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.environment-* $(VENV)/.built-* $(VENV)/.installed-* $(VENV)/.peers-*
	$(PIP) install --quiet --upgrade 'pip>=23'
	$(PIP) install '$(TORCH)'
	$(PIP) install --quiet --requirement requirements-dev.txt
	@touch $@

# Engines that the benchmark compares with. Where one has no wheel for this Python or processor, it goes without.
$(PEERS): $(ENVIRONMENT) benchmarks/requirements.txt
	@$(PIP) install --quiet --requirement benchmarks/requirements.txt && touch $@ || \
		echo "warning: not all of benchmarks/requirements.txt could be installed; these peers are left out" >&2

$(PROGRAMS): benchmarks/requirements-programs.txt
	@test -x $(PROGRAMS_VENV)/bin/python || $(PYTHON) -m venv $(PROGRAMS_VENV)
	@rm -f $(PROGRAMS_VENV)/.installed-*
	$(PROGRAMS_VENV)/bin/python -m pip --disable-pip-version-check install '$(TORCH)'
	$(PROGRAMS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

$(BUILT): $(ENVIRONMENT) setup.py $(shell find csrc -type f 2>/dev/null)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

# For `import fused_rnn` outside of this folder, and for the package's metadata.
$(INSTALLED): $(ENVIRONMENT) setup.py pyproject.toml | $(BUILT)
	PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
