# Each target does its own set-up in a virtual environment; Python 3.11 or newer is all it needs.
#
#   TORCH=torch==2.11.0 make test    another PyTorch (the default is below)
#   PYTHON=python3.13 make demo      another interpreter

TORCH ?= torch==2.13.0
VENV := .venv
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := $(VENV)/bin
LAWS := $(addprefix tests/,test_import_rules.py expressions/test_index.py expressions/test_ir.py \
	expressions/test_intervals.py specification/test_modifiers.py specification/test_program.py \
	patterns/test_laws.py patterns/test_mask_laws.py)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test laws fuzz lint format types docs bench clean FORCE

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed-test ## make the virtual environment for tests, and do nothing else

demo: $(VENV)/.installed-demo ## run examples/demo.py
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.installed-test ## run the tests; choose some with ARGS="-k mask"
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

laws: $(VENV)/.installed-test ## run the tests of laws alone: expressions, specifications, rules, who imports whom
	$(BIN)/python -m pytest -n 2 -q $(LAWS) $(ARGS)

fuzz: $(VENV)/.installed-test ## draw random programs and compare with eager; choose how long with ARGS="--seconds 600"
	$(BIN)/python -m tests.fuzz $(ARGS)

lint: $(VENV)/.installed-test ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-test ## format the code, and fix what can be fixed safely
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

types: $(VENV)/.installed-test ## check types
	$(BIN)/mypy

# The notice that is silenced says that Material for MkDocs 9 is supported until May 2027.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-docs ## build the documentation site into site/; a warning is an error
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed-test ## measure the pass's share of compile time
	$(BIN)/python benchmarks/compile_time.py $(ARGS)

clean: ## remove the virtual environment, build products and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis fuzz-failures
	find fusepass patterns exporters tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# This file is written only if TORCH or PYTHON has changed: then the environment is made anew.
$(VENV)/.request: FORCE
	@test -n "$(PYTHON)" || { echo "fusepass needs Python 3.11 or newer: set PYTHON to one" >&2; exit 1; }
	@mkdir -p $(VENV)
	@test "$$(cat $@ 2>/dev/null)" = "$(PYTHON) $(TORCH)" || echo "$(PYTHON) $(TORCH)" > $@

# PyTorch goes first and is then pinned: nothing installed later may replace it by another build.
$(VENV)/.constraints: $(VENV)/.request
	@echo "== $(VENV): $$($(PYTHON) --version), $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fusepass needs Python 3.11 or newer, and $(PYTHON) is not" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m virtualenv --quiet --clear $(VENV) \
		|| { echo "cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "$(PYTHON) $(TORCH)" > $(VENV)/.request
	$(PIP) --upgrade "pip>=23.1"
	$(PIP) "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# The warning that is silenced says that a folder named like the package hides it: here it is the package.
$(VENV)/.installed-%: $(VENV)/.constraints pyproject.toml
	PYTHONWARNINGS="ignore:Editable installation" $(PIP) --constraint $(VENV)/.constraints --editable ".[$*]"
	@touch $@
