# Every target sets up what it needs, given Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format setup weights

demo: setup  ## train on the built-in digits, draw samples, print the table: about 4 minutes on 2 cores
	$(BIN)/python -m train

weights: setup  ## train, measure and put in place the digits that come with the program, serve/demo
	$(BIN)/python -m train run=runs/demo bundle.half=true
	rm -rf serve/demo
	cp -r runs/demo/bundle-half serve/demo

# Bytecode is kept even where the environment says otherwise: hundreds of processes would compile torch and Ray again.
test: setup  ## the tests, in up to 4 processes
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict -c docker/.yamllint.yaml docker configs

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'ddm needs Python 3.11 or later, this is {sys.version}'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@
