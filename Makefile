# From a fresh clone: `make demo`, `make reproduce`, `make test`.
# PYTHON chooses the interpreter (3.11 or newer) that the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo reproduce test lint docs pages clean

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.init_sensitivity --preset=quick --workdir=runs/demo

# Every experiment and one report, runs/reproduce-quick/report.html. PRESET=standard takes hours.
PRESET ?= quick
reproduce: $(VENV)/.installed
	$(BIN)/python -m experiments.reproduce --preset=$(PRESET)

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A page for each module, from its docstrings: docs/api/_build/index.html.
docs: $(VENV)/.installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going docs/api docs/api/_build

# README.md and docs/*.md from docs/results.
pages: $(VENV)/.installed
	$(BIN)/python -m experiments.readme

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) docs/api/_build docs/api/modules runs
