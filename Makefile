# make demo   the embedded synthetic alliance, HSL against local training, a table and a figure
# make test   lint, types and the whole test suite
# make drill  a provisioned federation with mutual TLS, and what breaks it (docs/faults.md)
# make lint | bench | clean
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Small models gain nothing from many threads per process, and a federation is many processes.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg PATH="$(abspath $(BIN)):$$PATH"

# Tests of whole federations wait for their sites half of the time: three at once on two processors, and these first.
WORKERS ?= 3

# The drill cuts cables and fills disks: in a network and a mount namespace of its own. `make drill ISOLATED=` does
# without, where the kernel does not allow it; the drills that need one are then skipped.
ISOLATED := unshare --map-root-user --net --mount

.PHONY: demo test drill lint bench clean

demo: $(VENV)/.installed
	$(BIN)/heterosync demo --out build/demo

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40

drill: $(VENV)/.installed-dev
	$(TEST_ENV) DRILL_RECORD=docs/drill.txt $(ISOLATED) $(abspath $(BIN))/python -m pytest -m "secure or drill" -v --tb=short

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist runs .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make the installation happen once, and again when what is installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
