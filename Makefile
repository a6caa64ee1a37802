# make demo | make test: each sets up a virtual environment by itself the first time, and works at once after that.
# make check: formatting, lint and types as well.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: demo test check mutants clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.ready
	@echo "demo: training one classifier four ways on small images, about a minute"
	@$(BIN)/python examples/train_classifier.py

test: $(VENV)/.ready
	@echo "test: every op, layer, bridge and example, several minutes on two cores"
	@$(BIN)/python -m pytest -q -n auto --dist loadgroup $(TESTS)

check: $(VENV)/.ready
	@echo "check: formatting, lint and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

mutants: $(VENV)/.ready
	@echo "mutants: faults planted in a copy, each with the test that must find it, some minutes"
	@$(BIN)/python tools/mutants.py

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setup: a virtual environment in $(VENV) with everything the project uses, a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable} is Python {sys.version.split()[0]}: 3.11 or newer is needed (make PYTHON=python3.12 ...)")'
	@$(PYTHON) -m venv $(VENV)
	@PYTHON=$(BIN)/python tools/install
	@touch $@

clean:
	rm -rf $(VENV) .venv-* out build dist
