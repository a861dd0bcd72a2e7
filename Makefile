# `make` alone lists the targets. Each sets up what it needs; a second run starts in seconds.
PYTHON ?= python3.11
AZURITE_VERSION := 3.37.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := $(VENV)/.torch-installed
DEV := $(VENV)/.dev-installed
AZURITE := .tools/.azurite-$(AZURITE_VERSION)
OLDEST := build/oldest
NEWEST := build/newest
FRAMEWORKS := build/frameworks
RAY := build/ray
AUDIT := build/audit
CORE_TESTS := tests/test_*.py tests/checkpoint tests/cli tests/conformance tests/filesystem
PEER ?= build/peer/bin/python
FUZZ_SECONDS ?= 60
SOAK_SECONDS ?= 600

# A venv with the packages of $(VENV), except those that $(2) names to pip.
define beside
$(BIN)/python -m venv --without-pip --clear $(1)
$(BIN)/python -c 'import sys; from sysconfig import get_path; open(get_path("purelib", vars={"base": sys.argv[1]}) + "/beside.pth", "w").write(get_path("purelib"))' $(1)
$(BIN)/python -m pip --disable-pip-version-check --python $(1)/bin/python install --quiet $(2)
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test exhaustive docs lint format types check fuzz soak coverage reliability interleavings oldest newest frameworks ray audit build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV) $(AZURITE)  ## create .venv and .tools: pinned torch, the project with its extras, Azurite

demo: setup  ## train on images in Azurite, stop mid-epoch with SIGTERM, resume at the exact batch
	$(BIN)/python -m recipes.demo

bench: setup  ## compare with other libraries and write docs/performance.md; BENCH= selects servers (default: Azurite)
	$(BIN)/python -m recipes.benchmarks $(BENCH)

# Most tests wait for sockets and processes: several at once, also on few CPUs.
test: setup  ## run the tests; SLOW=1 adds slow tests, ARGS= is passed to pytest
	$(BIN)/python -m pytest --numprocesses=4 --dist=worksteal -m "not exhaustive and not site$(if $(SLOW),, and not slow)" $(ARGS)

# Every place of the sweeps, each cell of the fault matrix: takes about an hour.
exhaustive: setup  ## run the tests in full, before a release
	SWEEP=all $(BIN)/python -m pytest --numprocesses=4 --dist=worksteal $(ARGS)

docs: $(DEV)  ## build the site into build/docs, run its doctests, check its links and names; LINKS=1 also checks links to other sites
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	$(BIN)/sphinx-build -W -q -b doctest docs build/doctest
	SITE=build/docs $(BIN)/python -m pytest -q -m site tests/docs
	$(if $(LINKS),$(BIN)/sphinx-build -q -b linkcheck docs build/links)

lint: $(DEV)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(DEV)  ## apply style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(DEV)  ## check types for the oldest and the newest Python; ALL=1 adds the versions in between
	$(foreach minor,$(if $(ALL),11 12 13),$(BIN)/mypy --python-version 3.$(minor) &&) true
	$(BIN)/mypy --python-version 3.10 & oldest=$$!; $(BIN)/mypy --python-version 3.14; newest=$$?; wait $$oldest && exit $$newest

check: lint types test  ## run lint, types, and test

fuzz: $(DEV)  ## fuzz the parsers; FUZZ_SECONDS= is the time for each target
	$(BIN)/python -m tests.fuzz $(FUZZ_SECONDS)

soak: $(DEV)  ## use everything under random faults for SOAK_SECONDS= (600); memory, threads, and open files must not grow
	$(BIN)/python -m tests.soak $(SOAK_SECONDS)

coverage: setup  ## run the tests and report branches of the package that no test takes; ARGS= is passed to pytest
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=95 -m "not untraced and not exhaustive" --numprocesses=2 --timeout=300 $(ARGS)

reliability: setup build/soak.md $(if $(filter build/peer/%,$(PEER)),$(PEER))  ## run every fault and write docs/reliability.md; PEER= is a Python with the published connector
	$(BIN)/python -m pytest tests/faults/test_matrix.py --numprocesses=2 --junitxml=build/matrix.xml
	$(BIN)/python -m tests.faults.reliability build/matrix.xml build/soak.md $(PEER)

interleavings: $(DEV)  ## run saves, loads, and cleaning in every order and write the table in docs/reliability.md; ORDERS= is the number of random orders of three
	$(BIN)/python -m tests.interleavings $(or $(ORDERS),100000)

oldest: setup  ## run the core tests with the oldest supported dependencies; ARGS= is passed to pytest
	$(call beside,$(OLDEST),--requirement requirements-oldest.txt)
	$(BIN)/python -m pip --disable-pip-version-check --python $(OLDEST)/bin/python check
	$(OLDEST)/bin/python -m pytest -m "not slow and not exhaustive" $(CORE_TESTS) $(ARGS)

newest: setup  ## run the core tests with the newest releases and pre-releases of the dependencies; ARGS= is passed to pytest
	$(call beside,$(NEWEST),--upgrade --pre azure-storage-blob azure-core azure-identity torchdata)
	$(BIN)/python -m pip --disable-pip-version-check --python $(NEWEST)/bin/python check
	$(BIN)/python -m pip --disable-pip-version-check --python $(NEWEST)/bin/python list | grep -E '^(azure-|torch)'
	$(NEWEST)/bin/python -m pytest -m "not slow and not exhaustive" $(CORE_TESTS) $(ARGS)

# litdata goes without its dependencies: torchvision and obstore are large and unused here, and boto3 refuses the pinned
# python-dateutil. It imports boto3, so that and its parts are named.
frameworks: setup  ## run the tests with other frameworks (Lightning, transformers, zarr, ...) in a separate venv; ARGS= is passed to pytest
	$(call beside,$(FRAMEWORKS),--constraint constraints.txt lightning transformers accelerate datasets zarr webdataset torch-checkpointing)
	$(BIN)/python -m pip --disable-pip-version-check --python $(FRAMEWORKS)/bin/python install --quiet --constraint constraints.txt --no-deps litdata boto3 botocore s3transfer jmespath
	$(FRAMEWORKS)/bin/python -m pytest -m frameworks -k "not ray" --numprocesses=2 --dist=worksteal tests/frameworks $(ARGS)

# By itself, since each cluster of Ray takes all processors.
ray: setup  ## run the tests with Ray in a separate venv; ARGS= is passed to pytest
	$(call beside,$(RAY),--constraint constraints.txt 'ray[data,train]')
	$(RAY)/bin/python -m pytest -m frameworks -k ray tests/frameworks $(ARGS)

audit: $(DEV)  ## check that dependencies are compatible, and look up known vulnerabilities of those that users get
	$(BIN)/python -m pip --disable-pip-version-check check
	@$(AUDIT)/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip --disable-pip-version-check install --quiet pip-audit
	$(BIN)/python -m tests.audit $(AUDIT)/bin/pip-audit

build: $(DEV)  ## build the source archive and the wheel in dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove everything that the other targets created
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

build/soak.md: | $(DEV)
	$(BIN)/python -m tests.soak $(SOAK_SECONDS)

build/peer/bin/python: | $(DEV)
	$(call beside,build/peer,azstoragetorch==0.2.0)
