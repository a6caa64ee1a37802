# make demo | test | test-all: each sets up a virtual environment by itself the first time, and works at once after that.
# make test leaves out what takes long; make test-all is what continuous integration runs.
# make check: formatting, lint and types as well. make docs: the documentation as a site.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
# Of test-all: --all, or --each for every test, but of sweeps only what make test has.
SLOW ?= --all
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -q -n auto --dist loadgroup
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: demo test test-all check docs mutants release-check clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.ready
	@echo "demo: training one classifier four ways on small images, about a minute"
	@$(BIN)/python examples/train_classifier.py

test: $(VENV)/.ready
	@echo "test: every op, layer and bridge, some minutes on two cores; make test-all runs the slow ones too"
	@$(PYTEST) $(TESTS)

test-all: $(VENV)/.ready
	@echo "test-all: the slow ones too: sweeps, fuzz, processes, sanitizers and examples, some 20 minutes on two cores"
	@JAXSPARSE_FUZZ_EXAMPLES=$${JAXSPARSE_FUZZ_EXAMPLES:-600} $(PYTEST) $(SLOW) --durations=25 $(TESTS)

check: $(VENV)/.ready
	@echo "check: formatting, lint and types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

docs: $(VENV)/.ready
	@echo "docs: the site, with warnings and dead links as errors, some seconds"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build
	@echo "docs: open out/site/index.html"

mutants: $(VENV)/.ready
	@echo "mutants: faults planted in a copy, each with the test that must find it, some minutes"
	@$(BIN)/python tools/mutants.py

release-check:
	@echo "release-check: an sdist, wheels for two architectures, and each tried in a fresh environment, half an hour"
	@$(PYTHON) -m venv .venv-release
	@.venv-release/bin/python -m pip install -q -r tools/release-requirements.txt
	@.venv-release/bin/python tools/release.py

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setup: a virtual environment in $(VENV) with everything the project uses, a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable} is Python {sys.version.split()[0]}: 3.11 or newer is needed (make PYTHON=python3.12 ...)")'
	@$(PYTHON) -m venv $(VENV)
	@PYTHON=$(BIN)/python tools/install
	@touch $@

clean:
	rm -rf $(VENV) .venv-* out build dist
