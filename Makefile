# Everything runs in .venv, which the first target that needs it makes. PYTHON: any Python from 3.10 on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint compile-report gpu-check gpu-wheels clean

demo: .venv/demo.stamp
	$(BIN)/ebr-engine demo --out demo

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# What the compilers make of every kernel; needs Triton, no GPU. A few minutes.
compile-report: .venv/dev.stamp
	$(BIN)/python -m benchmarks.compile_report --json benchmarks/results/compile_report.json

# Everything to know of this machine's GPU. Without .venv it runs where torch for that GPU already is: make gpu-check PYTHON=...
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

# What that needs beside torch, triton and numpy, for a machine that fetches nothing: listed, and fetched to build/gpu-wheels.
gpu-wheels:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_wheels --list
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_wheels

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/bin/python constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo.stamp

clean:
	rm -rf .venv build dist demo *.egg-info
