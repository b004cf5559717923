# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

.PHONY: help demo test lint format conformance-full mutants bench docs clean

help:
	@echo "make demo              compare nine losses on noisy digits; leaves runs/demo/report.html"
	@echo "make test              install and run the whole test suite"
	@echo "make lint              formatter, linter and type checker"
	@echo "make docs              build the documentation into docs/_build"
	@echo "make conformance-full  the contracts with Inductor on every loss"
	@echo "make bench             speed and memory beside other libraries; under half an hour on two cores"
	@echo "make mutants           plant faults in the losses and count those that the suite catches"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "telos needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: the pinned version decides which build everything after it finds installed
$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(PIP) torch
	@touch $@

$(VENV)/.lab: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.lab

# lightly brings torchvision; a build for another torch than the one here would break whatever looks for it
$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[bench]'
	@touch $@

demo: $(VENV)/.lab
	$(VENV)/bin/telos compare digits_noisy \
	  "loss=cross_entropy,label_smoothing,focal,gce,sce,comp_sum,z_loss,ldr_kl,stablemax_cross_entropy" \
	  seeds=10 trials=6 out=runs/demo

test: $(VENV)/.dev
	$(PYTEST)
	TELOS_TYPECHECK=0 $(PYTEST) -m bare

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

conformance-full: $(VENV)/.dev
	$(PYTEST) tests/conformance
	TELOS_CONFORMANCE_FULL=1 TELOS_TYPECHECK=0 $(PYTEST) -m bare tests/conformance

mutants: $(VENV)/.dev
	$(PY) tools/mutants.py

bench: $(VENV)/.bench
	$(PY) -m benchmarks
	$(PY) tools/benchmarks_table.py

docs: $(VENV)/.dev
	$(PY) -m sphinx -W -b html docs docs/_build

clean:
	rm -rf $(VENV) docs/_build docs/reference runs
