# The commands of the README. Each makes the environment first when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads that wait for each other without spinning: a little slower on quiet cores, several times faster on busy ones.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test test-slow lint clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/keural run recipes/toy

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache
