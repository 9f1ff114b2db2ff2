PYTHON ?= python3
BIN := .venv/bin

# TORCH=cpu takes PyTorch's build without CUDA, a tenth of the size. It is not on PyPI: TORCH_INDEX is the address that pytorch.org names under
# "Get Started", for pip and the CPU. It is read from the user, so that no package comes from an address that a file brought along.
TORCH ?=
TORCH_INDEX ?=
LOCK := $(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra dev pyproject.toml

.PHONY: help install demo test coverage fuzz lint docs release bench lock locked sbom
help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

.venv/.installed: pyproject.toml constraints.txt
	@test "$(TORCH)" != cpu || test -n "$(TORCH_INDEX)" || \
	  { echo "TORCH=cpu needs TORCH_INDEX=ADDRESS: the one that pytorch.org names for pip and the CPU"; exit 2; }
	$(PYTHON) -m venv .venv
ifeq ($(TORCH),cpu)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --index-url '$(TORCH_INDEX)' torch torchvision
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

install: .venv/.installed  ## the package and its tools in .venv

lock: install   ## newer versions of everything: constraints.txt, and requirements.lock with the hash of each file
	$(LOCK) --output-file constraints.txt
	$(LOCK) --constraint constraints.txt --generate-hashes --output-file requirements.lock

locked:         ## the same in .venv, but only files whose hashes are in requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch .venv/.installed

sbom: install   ## what is installed, as a CycloneDX bill of materials: out/sbom.json
	@mkdir -p out
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-format JSON --output-file out/sbom.json $(BIN)/python

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

docs: install   ## the documentation as a site in out/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

release: install  ## source distribution and wheel in dist, checked
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: install  ## every benchmark, one after the other
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done
