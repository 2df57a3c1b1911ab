# Two commands do all set-up: `make pick` runs the main job, `make test` the checks. Both need only Python 3.11 to 3.13 with pip.
#   PYTHON=python3.12             which Python makes the virtual environment (default: the first suitable one found)
#   PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'   a CPU build of torch where your index has only CUDA's

PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help pick test test-all lint bench clean

help:
	@echo 'make pick      install into $(VENV) and run the main job: measure, pick, write hasten-out/'
	@echo 'make test      install, then ruff, mypy and the tests'
	@echo 'make test-all  the same with the slow matrix'
	@echo 'make bench     speed against peers and against the physical ceiling'

pick: $(VENV)/.installed
	$(BIN)/hasten pick

test: lint
	$(BIN)/pytest -q -m 'not slow'

test-all: lint
	$(BIN)/pytest -q

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	@for file in bench/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@set -e; for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if command -v $$python >/dev/null && $$python -c '$(SUITABLE)'; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo 'hasten needs Python 3.11, 3.12 or 3.13, and none was found; name one with: make PYTHON=/path/to/python3.12' >&2; exit 1; fi; \
	echo "making $(VENV) with $$found"; \
	$$found -m venv $(VENV) 2>/dev/null || { $$found -m venv --clear --without-pip $(VENV) && $$found -m pip --python $@ install -q pip; }

# One stamp for what a run needs and one for what the tests need; both go stale when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo 'installing into $(VENV): minutes the first time'
	@$(BIN)/python -m pip install -q $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo 'installing into $(VENV): minutes the first time'
	@$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[test]'
	@touch $@ $(VENV)/.installed
