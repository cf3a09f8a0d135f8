# Each target does all its own set-up, in .venv, and only once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-slow test-package test-oldest docs lint types format clean

help:
	@echo "make quickstart   train, probe, sample and compare AR and ST-AR on a CPU, in minutes; writes quickstart/report.html"
	@echo "make test         run the tests"
	@echo "make test-slow    run all of them, the slow ones too"
	@echo "make test-package build the package, install it into an empty environment and use it there"
	@echo "make test-oldest  run the core's tests on the oldest versions that pyproject.toml allows (PYTHON=python3.12 for another Python)"
	@echo "make docs         the documentation as a site, in site/index.html"
	@echo "make lint types   check style and types"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "st-ar needs Python 3.11 or newer; this is $$($(PYTHON) --version). Give one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quickstart]'
	@touch $@

# Many tests wait for processes that they start: one more at once than there are cores keeps the cores busy.
WORKERS := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.quickstart
	$(BIN)/st-ar quickstart --out quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not slow'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

test-package: $(VENV)/.dev
	PYTHON=$(PYTHON) .ci/package

# torch comes as the package index has it: on Linux that is the CUDA build, 5 GB with what it needs.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[quickstart,data,hub,metrics]' \
	  hypothesis pytest pytest-xdist scipy tensorboard
	@touch $@

CORE_TESTS := tests/selfguided tests/model tests/tokenizer tests/data tests/training tests/test_sampling.py tests/test_config.py \
  tests/test_presets.py tests/cli tests/test_hub.py tests/test_report.py tests/test_figures.py

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m 'not slow' -W ignore::DeprecationWarning $(CORE_TESTS) # old packages among new ones

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.dev
	$(BIN)/python docs/options.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) quickstart site dist
