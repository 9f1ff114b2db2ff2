PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo test coverage fuzz lint bench
help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: .venv/.installed  ## the package and its tools in .venv

demo: install   ## the main job, end to end, on a generated cohort
	$(BIN)/raredistill demo --out out/demo

test: install   ## every test
	$(BIN)/pytest -n auto

coverage: install  ## every test, and the lines and branches of src that they reach: fails under 90 %
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fuzz: install   ## every reader with FUZZ_INPUTS (20,000) damaged files; hours on a slow machine
	$(BIN)/pytest tests/fuzz -m fuzz

lint: install   ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: install  ## every benchmark, one after the other
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done
