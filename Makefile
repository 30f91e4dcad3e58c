# Every command of the house. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# ninja lies beside python, and is looked for on the path.
BUILDING := PATH="$(abspath $(BIN)):$$PATH"
NATIVE := $(VENV)/.native
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo serve check format test soak bench clean

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) $(NATIVE)  ## Create .venv with every dependency at its pinned version

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): about four minutes and 1.6 GB, once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools ninja
	$(BUILDING) $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[service,postgres,dev]'
	@touch $(STAMP)

# The C++ library alone, where only its sources are newer; what checks code needs no library.
$(NATIVE): setup.py $(wildcard syncbn/csrc/*) | $(STAMP)
	test -f syncbn/_native.so -a -z "$$(find setup.py syncbn/csrc -newer syncbn/_native.so)" || $(BUILDING) $(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c 'import logging; logging.basicConfig(level=logging.INFO, format="%(message)s"); from syncbn import native; native.available()'
	@touch $(NATIVE)

demo: $(STAMP) $(NATIVE)  ## Train a real model on four ranks, through the service
	@exec $(BIN)/python examples/demo.py

serve: $(STAMP) $(NATIVE)  ## Start the service on this machine, until Ctrl-C
	@exec $(BIN)/syncbn serve

check: $(STAMP)  ## Format, lint, types, import contracts (seconds)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code and apply the safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: check $(NATIVE)  ## Set up, check, and run the whole suite
	$(BIN)/pytest $(PYTEST_ARGS)

soak: $(STAMP) $(NATIVE)  ## Inject every fault many times (half an hour); the report goes to benchmarks/results/
	timeout --kill-after=30 3600 $(BIN)/pytest tests/soak --timeout 900 $(PYTEST_ARGS)

bench: $(STAMP) $(NATIVE)  ## Run the benchmarks; results go to benchmarks/results/
	$(BIN)/python -m benchmarks.run_all

clean:  ## Remove what the commands above made
	rm -rf $(VENV) build dist *.egg-info syncbn/_native.so .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .demo
