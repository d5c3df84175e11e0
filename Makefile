# The tasks of this project; `make` alone lists them. All run in .venv, which is made on first use
# and left alone until pyproject.toml or constraints.txt change. Only packages are downloaded.

PYTHON   ?= python3
EXTRAS   ?= tensorflow,jax,dev
BACKENDS ?= tensorflow jax torch
WORKERS  ?= 2
PYTEST_ARGS ?=

VENV  := .venv
PY    := $(VENV)/bin/python
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
# What only the documentation needs is installed with the first `make docs` or `make test-slow`.
DOCS_STAMP := $(STAMP)-docs

# The lowest versions that pyproject.toml allows, of what it gives a lower bound; the rest as ever.
LOWEST       := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed
LOWEST_PINS  := 'keras==3.12.*' 'numpy==2.0.*' 'ml-dtypes==0.5.1' 'pytest==8.4.*'

JAX_XLA_FLAGS := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

export TF_CPP_MIN_LOG_LEVEL ?= 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-slow test-lowest docs lint format clean distclean

help: ## list the tasks
	@echo "usage: make TASK"
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo "variables: PYTHON=$(PYTHON) EXTRAS=$(EXTRAS) BACKENDS=\"$(BACKENDS)\" WORKERS=$(WORKERS) PYTEST_ARGS=\"$(PYTEST_ARGS)\""

venv: $(STAMP) ## create .venv and install the project with its extras

# The interpreter exists before pip does: an environment left half made is removed again.
$(PY):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found. Name a Python of 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "       Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml constraints.txt | $(PY)
	@echo "Installing keras-compaware[$(EXTRAS)] into $(VENV); the first time takes minutes."
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(STAMP) ## train, compress and export a small network; ends with a table of results
	$(PY) -m apps.train --config=configs/digits_low_rank.py --workdir=runs/demo --overwrite

# $(call run-tests,MARKERS,PYTEST ARGUMENTS,PYTEST ARGUMENTS FOR THE FIRST BACKEND ONLY)
# Runs the tests once on every installed backend, whatever becomes of the others, and fails if one
# of them failed. One thread per worker: the workers are what keeps the cores busy. On JAX, most of
# the time goes into compiling what runs once, so that XLA is told to optimise little.
define run-tests
results=; failed=0; once='$(3)'; others=; \
for backend in $(BACKENDS); do \
  if ! $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('$$backend') is None)"; then \
    results="$$results\n  $$backend: not installed, not tested"; continue; \
  fi; \
  markers='$(1)'; test $$backend = tensorflow || markers="$$markers and not tensorflow"; \
  markers="$$markers$$others"; others=' and not once'; \
  echo "== $$backend: pytest -m \"$$markers\""; \
  status=0; flags="$$XLA_FLAGS"; test $$backend != jax || flags="$(JAX_XLA_FLAGS) $$flags"; \
  env XLA_FLAGS="$$flags" KERAS_BACKEND=$$backend COVERAGE_FILE=.coverage.$$backend \
    OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
    $(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "$$markers" $(2) tests $$once $(PYTEST_ARGS) || status=$$?; \
  once=; \
  case "$$status $(1)" in \
    "0 "*) results="$$results\n  $$backend: passed";; \
    "5 slow") results="$$results\n  $$backend: passed, there are no slow tests for it";; \
    *) results="$$results\n  $$backend: FAILED (pytest exit status $$status)"; failed=1;; \
  esac; \
done; \
case "$$results" in \
  *passed*|*FAILED*) ;; \
  *) echo "error: none of these backends is installed in $(VENV): $(BACKENDS)" >&2; exit 1;; \
esac
endef

test: $(STAMP) ## the fast tests on every installed backend, the docstrings' examples, coverage
	@rm -f .coverage .coverage.*
	@$(call run-tests,not slow,--cov --cov-report=,--doctest-modules keras_compaware); \
	$(PY) -m coverage combine --quiet && $(PY) -m coverage report || failed=1; \
	printf "backends:$$results\n"; exit $$failed

test-slow: $(DOCS_STAMP) ## the slow tests on every installed backend
	@$(call run-tests,slow,,); \
	printf "backends:$$results\n"; exit $$failed

$(LOWEST_STAMP): pyproject.toml constraints.txt Makefile | $(PY)
	$(PY) -m venv $(LOWEST) || { rm -rf $(LOWEST); exit 1; }
	grep -viE '^(keras|numpy|ml_dtypes|pytest)==' constraints.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c $(LOWEST)/constraints.txt -e '.[tensorflow]' $(LOWEST_PINS) hypothesis pytest-xdist
	@touch $@

test-lowest: $(LOWEST_STAMP) ## the fast tests on TensorFlow, with the lowest versions allowed
	env KERAS_BACKEND=tensorflow OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
	  $(LOWEST)/bin/python -m pytest -q -n $(WORKERS) -m "not slow" tests $(PYTEST_ARGS)

docs: $(DOCS_STAMP) ## build the documentation as web pages, with warnings as errors
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "written to docs/_build/html/index.html"

lint: $(STAMP) ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP) ## mend what the linter can mend, and reformat
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove caches, coverage data, built packages and pages; keep .venv and runs
	rm -rf .coverage .coverage.* htmlcov dist .pytest_cache .ruff_cache .hypothesis
	rm -rf docs/_build docs/_generated
	find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .venv-lowest
	rm -rf $(VENV) $(LOWEST)
