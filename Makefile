# make demo            install, train on the digits, evaluate, write the report
# make demo DATA=mnist the same on MNIST
# make test            install, lint, check the format, run the tests

PYTHON ?= python3
DATA ?= digits
OUT ?= runs/$(DATA)
EPOCHS ?= $(if $(filter mnist,$(DATA)),20,200)
BIN = .venv/bin

.PHONY: demo test lint format clean

demo: .venv/.installed
	$(BIN)/pyrovae train --model bernoulli --guide mean_field --data $(DATA) --binarize dynamic \
		--objective trace_mean_field_elbo --epochs $(EPOCHS) --out $(OUT) --resume
	$(BIN)/pyrovae evaluate $(OUT) --samples 1000
	$(BIN)/pyrovae report $(OUT)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
