# Everything runs in .venv, which the first target that needs it makes. PYTHON: any Python from 3.10 on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/demo.stamp
	$(BIN)/ebr-engine demo --out demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/demo.stamp

clean:
	rm -rf .venv build dist demo *.egg-info
