# Two commands do everything from a fresh clone: `make demo` and `make test`.
# PYTHON chooses the interpreter (3.11 or newer) that the environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint standard clean

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.init_sensitivity --preset=quick --workdir=runs/demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Fashion-MNIST, five seeds; needs Debian's package dataset-fashion-mnist.
standard: $(VENV)/.installed
	$(BIN)/python -m experiments.init_sensitivity --preset=standard --workdir=runs/standard

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
