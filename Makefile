# make demo            install, train on the digits, evaluate, write the report
# make demo DATA=mnist the same on MNIST
# make test            install, lint, check the format and the types, run the tests
# make install         all that the targets need, which they install by themselves too
# make lint            the first part of it; `make format` fixes what can be fixed by itself
# make coverage        run the tests and say which lines and branches none of them reaches
# make soak            kill a thousand commands, spoil ten thousand files (an hour)
# make browser         look at the report in Chromium, which has to be installed
# make options         write docs/options.md from the options of the commands
# make lines           bring the line numbers of links in the documents up to date
# make docs            run the tutorials and build the documentation into site/, links checked

PYTHON ?= python3
DATA ?= digits
OUT ?= runs/$(DATA)
EPOCHS ?= $(if $(filter mnist,$(DATA)),20,200)
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
PYTEST = $(BIN)/python -m pytest
# One test a core, and a core that has run out of tests takes those of the slower one.
PARALLEL = -n auto --dist worksteal

# Importing torch takes twice as long where its bytecode may not be kept, and tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test lint format coverage soak browser options lines docs clean

demo: .venv/.installed
	$(BIN)/pyrovae train --model bernoulli --guide mean_field --data $(DATA) --binarize dynamic \
		--objective trace_mean_field_elbo --epochs $(EPOCHS) --out $(OUT) --resume
	$(BIN)/pyrovae evaluate $(OUT) --samples 1000
	$(BIN)/pyrovae report $(OUT)

test: lint
	$(PYTEST) $(PARALLEL)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: .venv/.installed-dev
	$(PYTEST) $(PARALLEL) --cov --cov-report=term

soak: .venv/.installed-dev
	PYROVAE_KILLS=1000 PYROVAE_INPUTS=10000 $(PYTEST) -s tests/runs/test_kills.py tests/cli/test_fuzz.py

browser: .venv/.installed-dev
	$(PYTEST) -m browser

options: .venv/.installed
	$(BIN)/python docs/_site/options.py > docs/options.md

lines:
	$(PYTHON) docs/_site/lines.py docs/*.md *.md

docs: .venv/.installed-docs
	$(BIN)/python -m mkdocs build --strict

# All that the targets need, in one call of pip: .ci/run begins with it.
install: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[dev,docs]'
	touch .venv/.installed .venv/.installed-dev .venv/.installed-docs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	$(PIP) --editable .
	touch $@

.venv/.installed-%: pyproject.toml | .venv/bin/python
	$(PIP) --editable '.[$*]'
	touch .venv/.installed $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage
