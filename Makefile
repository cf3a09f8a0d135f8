# Each target does all its own set-up, in .venv, and only once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-slow lint types format clean

help:
	@echo "make quickstart   train, probe, sample and compare AR and ST-AR on a CPU, in minutes; writes quickstart/report.html"
	@echo "make test         run the tests"
	@echo "make lint types   check style and types"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "st-ar needs Python 3.11 or newer; this is $$($(PYTHON) --version). Give one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quickstart]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.quickstart
	$(BIN)/st-ar quickstart --out quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m 'not slow'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) quickstart
