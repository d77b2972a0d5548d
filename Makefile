# Every target makes the virtual environment first, where it is missing or older than the pins.
# PYTHON=... chooses the interpreter for it; PYTEST_ARGS=... adds to the tests' command line;
# SEED=... repeats a random order of tests.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo drill test sim scale test-integrations lint fmt docs bench clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.stamp
# Given here because -q hides the seed that pytest-randomly would choose.
SEED := $(or $(SEED),$(shell date +%s))
IS_RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PIP_INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 \
	$(BIN)/python -m pip install --quiet -c constraints.txt
INTEGRATION_INSTALL = $(PIP_INSTALL:$(BIN)/python=$(@D)/bin/python) -c constraints-integrations.txt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## see a job lose a process, and come back
	$(BIN)/ckptd demo

drill: $(READY) ## inject every fault into real jobs, and see who is blamed: 40 minutes
	$(BIN)/ckptd drill --timing
	$(BIN)/ckptd drill

test: $(READY) ## run the tests (PYTEST_ARGS="-k stripe" chooses among them)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --randomly-seed=$(SEED) $(PYTEST_ARGS)

SEEDS := 1-1000
sim: $(READY) ## simulate clusters through faults (SEEDS=1-1000)
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

scale: $(READY) ## measure the coordinator by the number of nodes: its decisions, and idle
	$(BIN)/python -m tests.sim.scale
	$(BIN)/python -m tests.sim.idle

# Each library is in an environment of its own: about 1 GB, made once.
INTEGRATIONS := transformers lightning accelerate
test-integrations: $(INTEGRATIONS:%=build/venv-%/.stamp) ## train, kill and resume with each library
	for library in $(INTEGRATIONS); do \
		build/venv-$$library/bin/python -m pytest -q -rs $(PYTEST_ARGS) \
			tests/integrations/test_$$library.py; \
	done

lint: $(READY) ## check style, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/diagrams.py --check

docs: $(READY) ## draw the state diagrams of ARCHITECTURE.md anew from the code
	$(BIN)/python docs/diagrams.py

fmt: $(READY) ## format the code, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## measure the codec and the capture on this machine
	$(BIN)/ckptd bench erasure
	$(BIN)/ckptd bench capture --state 100MiB --repeats 3 --steps 3

clean: ## remove the virtual environment, build outputs and caches
	rm -rf $(VENV) build dist ckptd.egg-info .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis
	find ckptd agent cli erasure tests -name __pycache__ -type d -prune -exec rm -rf {} + \
		2>/dev/null || true

$(READY): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c '$(IS_RECENT)' 2>/dev/null; then \
		found=; \
		for candidate in $(or $(PYTHON),python3.11 python3); do \
			if "$$candidate" -c '$(IS_RECENT)' 2>/dev/null; then found=$$candidate; break; fi; \
		done; \
		if [[ -z $$found ]]; then \
			echo 'ckptd needs Python 3.11 or newer, with its venv module. Tried, and found too old' \
				'or missing: $(or $(PYTHON),python3.11 python3).' \
				'Name another one: make PYTHON=/path/to/python' >&2; \
			exit 1; \
		fi; \
		echo "making the virtual environment, once: a minute or two ($$("$$found" -V))"; \
		"$$found" -m venv --clear $(VENV); \
	else \
		echo 'bringing the virtual environment up to date'; \
	fi
	@echo '  installing torch, the large one'
	@$(PIP_INSTALL) torch==2.13.0
	@echo '  installing ckptd and its development tools'
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@

build/venv-%/.stamp: $(READY) constraints-integrations.txt
	@echo 'making the environment for $*'
	@$(BIN)/python -m venv $(@D)
	@$(INTEGRATION_INSTALL) torch==2.13.0
	@$(INTEGRATION_INSTALL) -e '.[$*]' pytest pytest-timeout
	@touch $@
