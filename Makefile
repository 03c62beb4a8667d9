# `make demo` and `make test` each work as the first command in a fresh clone. They need git, a Python 3.10 to 3.13 with
# its venv module, and, for the compiled extension only, a C++ compiler.

PYTHON ?= python3
PYTEST_ARGS ?=
WORKLOAD ?= gpt2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.installed
EXTRAS := bench,demo,dev,test,tutorials

.PHONY: help demo test check lint format tutorials bench clean venv
.NOTPARALLEL:

help:
	@echo "make demo       a real model on real sentences, and a small one trained: before and after, report"
	@echo "make test       the tests                      (PYTEST_ARGS='-k name' to choose)"
	@echo "make check      lint, formatting, types, import layers"
	@echo "make lint       ruff only"
	@echo "make format     rewrite the code in the project's format"
	@echo "make tutorials  execute the notebooks"
	@echo "make bench      one benchmark                  (WORKLOAD=$(WORKLOAD))"
	@echo "make venv       only set up $(VENV)             (PYTHON=$(PYTHON))"
	@echo "make clean      remove what was built, the environment too"

demo: $(STAMP)
	@$(BIN)/python demo/embed.py
	@$(BIN)/python -m demo.train

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: lint
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m benchmarks.readme --check

lint: $(STAMP)
	@$(BIN)/ruff check .

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tutorials: $(STAMP)
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/tutorials

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.$(WORKLOAD)

venv: $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f oslo_fusion/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in before this package, because the extension is compiled against it. The environment's bin/ is put on the path
# so that the build finds ninja. An extension of an earlier build is removed first: otherwise it would be taken for this one's.
# Some distributions ship a venv module that cannot put pip into what it makes; there, the system's pip does it.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard oslo_fusion/csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	    "oslo_fusion needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "Setting up $(VENV) (once; torch is a large download) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
	    || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip -q --python $(BIN)/python install pip; } \
	    || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (python3-venv)" >&2; exit 1; }
	@$(PIP) install -c constraints.txt pip setuptools wheel ninja
	@$(PIP) install -c constraints.txt torch numpy
	@rm -f oslo_fusion/_C.*
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONWARNINGS="ignore:Editable installation" $(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -c 'from oslo_fusion import extension; \
	    print("compiled extension:", extension.failure() or extension.build_info()["compiler"])'
	@touch $@
