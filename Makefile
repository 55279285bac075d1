# `make` alone lists the targets. Needs Python 3.11 or newer with venv; scripts/bootstrap.sh says what is missing.
.PHONY: help setup demo test lint type docs reference conformance thorough check clean
.DEFAULT_GOAL := help

BIN := .venv/bin
# More options for pytest: make test PYTEST="-k wire -x"
PYTEST :=

help:
	@echo "make setup      make .venv and install fedllm into it"
	@echo "make demo       set up, then run fedllm demo"
	@echo "make test       set up, then lint, type and the tests"
	@echo "make lint       style, format and import layers"
	@echo "make type       types of the package"
	@echo "make docs       build the documentation into docs/_build/html"
	@echo "make reference  write the generated pages of docs/reference again"
	@echo "make conformance  try every tuning method with every family and task"
	@echo "make thorough   all tests with every pair of methods and every point of every crash; half an hour"
	@echo "make check      test and docs"
	@echo "make clean      remove caches and build outputs; keeps .venv and runs"

setup:
	@sh scripts/bootstrap.sh

demo: setup
	@$(BIN)/fedllm demo

test: lint type
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not processes" $(PYTEST) || [ $$? -eq 5 ]
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m processes $(PYTEST) || [ $$? -eq 5 ]

lint:
	@sh scripts/bootstrap.sh test,lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

type:
	@sh scripts/bootstrap.sh test,lint
	@$(BIN)/mypy

docs:
	@sh scripts/bootstrap.sh docs
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

reference:
	@sh scripts/bootstrap.sh test,lint
	@$(BIN)/python scripts/make_reference.py
	@$(BIN)/python tests/conformance/table.py

conformance:
	@sh scripts/bootstrap.sh test,lint
	@FEDLLM_CONFORMANCE=all $(BIN)/python -m pytest -n 2 tests/conformance $(PYTEST)

thorough:
	@sh scripts/bootstrap.sh test,lint
	@FEDLLM_CONFORMANCE=all FEDLLM_THOROUGH=1 $(BIN)/python -m pytest -o timeout=1200 -n 2 --dist worksteal -m "not processes" $(PYTEST)
	@FEDLLM_THOROUGH=1 $(BIN)/python -m pytest -m processes $(PYTEST)

check: test docs

clean:
	rm -rf build dist docs/_build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts docs -name __pycache__ -type d -prune -exec rm -rf {} +
