# `make` alone lists the targets. Each sets up what it needs; a second run starts in seconds.
PYTHON ?= python3.11
AZURITE_VERSION := 3.37.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := $(VENV)/.torch-installed
DEV := $(VENV)/.dev-installed
AZURITE := .tools/.azurite-$(AZURITE_VERSION)

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test docs lint format types check build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV) $(AZURITE)  ## make .venv and .tools: pinned torch, the project with its extras, Azurite

demo: setup  ## train on images in Azurite, lose the process, resume from the checkpoint blob
	$(BIN)/python -m recipes.demo

bench: setup  ## compare with other libraries and write docs/performance.md; BENCH= says where (default: Azurite)
	$(BIN)/python -m recipes.benchmarks $(BENCH)

# Most tests wait for sockets and processes: several at once, also on few CPUs.
test: setup  ## run the tests; SLOW=1 adds those marked slow, ARGS= goes to pytest
	$(BIN)/python -m pytest --numprocesses=4 --dist=worksteal $(if $(SLOW),,-m "not slow") $(ARGS)

docs: $(DEV)  ## build the site into build/docs, run its doctests, check its links; LINKS=1 asks other sites too
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	$(BIN)/sphinx-build -W -q -b doctest docs build/doctest
	$(BIN)/python docs/links.py build/docs
	$(if $(LINKS),$(BIN)/sphinx-build -q -b linkcheck docs build/links)

lint: $(DEV)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(DEV)  ## apply style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV)  ## check types
	$(BIN)/mypy

check: lint types test  ## lint, types and test

build: $(DEV)  ## make the source archive and the wheel in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove all that setup, test and build made
	rm -rf $(VENV) .tools build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch goes first and pinned: resolving it with the rest may take another, far larger build.
$(TORCH): constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not here; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	@touch $@

$(DEV): $(TORCH) pyproject.toml
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The Node.js of the venv runs npm here and Azurite later; one on the machine is not looked at.
$(AZURITE): | $(DEV)
	rm -rf .tools
	mkdir -p .tools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/npm install --prefix .tools --no-audit --no-fund --no-package-lock --loglevel=error azurite@$(AZURITE_VERSION)
	@touch $@
