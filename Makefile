# Each target does its own set-up: in a fresh clone, `make demo` or `make test` is all there is to type.

PYTHON ?= python3
WORKERS ?= 2
SEED ?= $(shell date +%j)
CASES ?= 10000

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo test fuzz lint paper clean

help:
	@echo "make demo   the demo model finds a passkey far past its training window"
	@echo "make test   all tests                        (WORKERS=$(WORKERS) processes, PYTEST_ARGS=...)"
	@echo "make fuzz   hostile and damaged bundles, checkpoints, command lines; kills; a soak   (SEED=..., CASES=... bundles)"
	@echo "make lint   ruff and mypy --strict"
	@echo "make paper  every method side by side, into docs/results (goes on where it was)"
	@echo "make venv   only the virtual environment     (PYTHON=$(PYTHON))"
	@echo "make clean  removes what the other targets made, the virtual environment too"

venv: $(INSTALLED)

# pip is the last thing that venv puts there, so an interrupted one is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The packages are installed again when what they follow from changes.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

# One thread for each process: the models are small, and the processes share the cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --durations 10 $(PYTEST_ARGS)

# CASES bundles, half as many checkpoints, and fewer of what takes longer; the seed is printed, and each fault's index.
fuzz: $(INSTALLED)
	@echo "seed $(SEED)"
	$(BIN)/python -m tests.fuzz bundles --seed $(SEED) --cases $(CASES) --kind llama,positions,ring,int4
	$(BIN)/python -m tests.fuzz bundles --seed $(SEED) --cases $$(($(CASES) / 10)) --backend openvino,torch
	$(BIN)/python -m tests.fuzz checkpoints commands kills --seed $(SEED) --traced 0.05 \
		--cases $$(($(CASES) / 2)) $$(($(CASES) / 5)) $$(($(CASES) / 20))
	$(BIN)/python -m tests.fuzz.soak --minutes 5 --seed $(SEED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

paper: $(INSTALLED)
	$(BIN)/python scripts/paper.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
