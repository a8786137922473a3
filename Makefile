# The two commands of a newcomer are `make demo` and `make test`: both do all of their own set-up (scripts/setup.sh).
VENV ?= .venv
PYTHON ?= python3
DATA ?= ../shared/data
DIST ?= dist
ARGS ?=

export PYTHON
BIN := $(abspath $(VENV))/bin
CXX_FILES := $(wildcard csrc/*.[ch]pp tests/native/*.[ch]pp benchmarks/native/*.[ch]pp)
PACKAGE := pyproject.toml README.md LICENSE constraints/cpu.txt scripts/setup.sh CMakeLists.txt CMakePresets.json \
	$(wildcard csrc/*) $(shell find proteus_fast kernels server -type f -not -path '*/__pycache__/*')

.PHONY: help demo test verify bench instructions checkpoint lint format wheel clean native-asan native-tsan
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

# one stamp a profile: rewritten when the package has been built and installed from the present sources
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(PACKAGE)
	scripts/setup.sh $(VENV) $*
	@touch $@

demo: $(VENV)/.demo  ## start the server, route a few hundred queries, print the table, draw the frontier
	$(BIN)/proteus demo $(ARGS)

test: native-asan  ## the whole suite, CPU only: native tests under ASan and UBSan, then pytest (ARGS="-k name")
	$(BIN)/pytest -n 2 --dist loadfile -p no:benchmark $(ARGS)

verify: native-tsan  ## the long checks: native tests under TSan, tests marked `verify`
	$(BIN)/pytest -m verify --hypothesis-profile=verify $(ARGS)

# built beside the virtual environment's own files, because the cache holds the paths of its cmake and ninja
native-asan native-tsan: native-%: $(VENV)/.dev
	PATH="$(BIN):$$PATH" cmake --preset $* -B $(VENV)/native-$*
	PATH="$(BIN):$$PATH" cmake --build $(VENV)/native-$*
	PATH="$(BIN):$$PATH" ctest --test-dir $(VENV)/native-$* --output-on-failure --no-tests=error

bench: $(VENV)/.dev  ## every path beside its baselines on one core, in one run (ARGS="-k decide")
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks --benchmark-columns=min,median $(ARGS)

instructions: $(VENV)/.dev  ## instructions of the native core beside the recorded counts (ARGS=--record)
	scripts/setup.sh $(VENV) valgrind
	$(BIN)/python benchmarks/instructions.py --build $(VENV)/native-bench $(ARGS)

checkpoint: $(VENV)/.dev  ## train the embedded router again, on the zeroeval table below DATA
	$(BIN)/python scripts/checkpoint.py --data $(DATA)/zeroeval

lint: $(VENV)/.dev  ## ruff, mypy, stubtest, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd $(VENV) && $(BIN)/stubtest proteus_fast._core
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.dev  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.demo  ## DIST/*.whl, built in isolation as `pip install .` builds it
	$(BIN)/pip wheel -q --no-deps --wheel-dir $(DIST) .
	@ls -l $(DIST)/*.whl

clean:  ## remove what was built, the virtual environment too
	rm -rf $(VENV) build $(DIST) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
