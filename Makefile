# Everything a person does with a checkout. `make` alone lists it; demo and test set up what they need on a fresh machine.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON  ?= python3.11
VENV    := .venv
BIN     := $(VENV)/bin
TESTBED ?= deploy/testbeds/demo.yaml
PINS    := deploy/requirements
READY   := $(VENV)/.ready

.PHONY: help demo boxes up down test test-boxes check bench lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml $(PINS)/dev.txt $(PINS)/torch.txt $(PINS)/torch-cuda.txt
	@command -v $(PYTHON) > /dev/null || { echo "Espalier needs Python 3.11: install it, or say PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r $(PINS)/dev.txt
	$(BIN)/pip install --quiet --no-deps --require-hashes -r $(PINS)/torch.txt || \
	  { echo "Torch's CPU build was not found (docs/install.md says where to get it); taking the one with gigabytes of CUDA."; \
	    $(BIN)/pip install --quiet --no-deps --require-hashes -r $(PINS)/torch-cuda.txt; }
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: ## the whole system on this machine, 60 s of load, the on-time table, out/demo/report.json (RUNTIME=engine|processes)
	deploy/demo.sh

boxes: ## three engines on this machine as one Swarm, a testbed over them, load, the on-time table, out/boxes/report.json
	deploy/boxes.sh

up: $(READY) ## export the models and start TESTBED (default: the demo's) in the background
	$(BIN)/espalier export $(TESTBED)
	$(BIN)/espalier up $(TESTBED) --limit 180
	@echo "now: source $(VENV)/bin/activate, then espalier status | scale | bench | down"

down: $(READY) ## drain and stop what `make up` started
	$(BIN)/espalier down --testbed $(TESTBED)

test: $(READY) ## every test, those in containers too where an engine answers or can be brought up
	tests/with-engine.sh $(BIN)/pytest

test-boxes: $(READY) ## boxes of a Swarm: updated, emptied, cut off, killed, added; managers and orchestrators lost (about 8 minutes)
	ESPALIER_TEST_BOXES=1 tests/with-engine.sh $(BIN)/pytest tests/system/test_boxes.py tests/system/test_managers.py

check: $(READY) ## style, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## overhead, throughput and overload as ratios, out/bench/report.json (about 15 minutes)
	$(BIN)/python -m tests.bench

lock: $(READY) ## pin every requirement file again, with hashes and without addresses
	deploy/requirements/lock.sh
