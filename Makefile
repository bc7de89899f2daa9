PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv install demo lint test test-all format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv install: $(STAMP) ## .venv with kd, editable, and everything the tests need (again when pyproject.toml changes)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(STAMP) ## three claims of Hinton 2015 on handwritten digits, offline, a few minutes
	$(VENV)/bin/kd demo

# one thread a process: two processes with two threads each would wait for one another on two cores
test: lint ## linter, formatter, types, and the tests that take no processes of their own
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint ## the same with all tests: kills, sweeps, studies, several processes, notebooks, the wheel
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal --durations=20

lint: $(STAMP) ## linter, formatter, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## what the linter and the formatter can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
	find kd tests experiments -name __pycache__ -prune -exec rm -rf {} +
