# make demo and make test set everything up on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help setup demo screenshots test test-packages test-reference test-server lint format bench gpu gpu-plan gpu-collect clean
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## a virtual environment with everything pinned
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dtn_fast needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@echo "Installing into $(VENV) (about 1.5 GB, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "cannot create $(VENV); on Debian: apt-get install python3-venv"; exit 2; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## make a set, train, distil, evaluate, export, detect: minutes on two cores
	@$(BIN)/dtn-fast demo

# Two workers, each with one thread: torch's threads would wait for one another on two busy cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
screenshots: demo  ## the README's pictures, of the demo, in headless Chromium
	@$(BIN)/python -m dtn_fast.cli.screenshots runs/demo

test: setup  ## every test that this machine can run, in two processes
	@$(PYTEST) --ignore tests/kernels/interpreted $(ARGS)
	@TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreted $(ARGS)

test-packages: setup  ## the wheel, each extra alone, the images' steps, wheels for other systems; needs the package index
	@$(PYTEST) --full tests/packages $(ARGS)

# The oldest torch and Triton that are supported, which the reference GPU machine has, with its Python where there is one.
# No CPU build of this torch is on the package index: about 5 GB on disk.
REFERENCE ?= $(VENV)/reference
PYTHON312 = $(firstword $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null) $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) $(PYTHON))
INSTALLED = $(REFERENCE)/.ready-torch-2.11.0-triton-3.6.0
$(INSTALLED):
	@echo "Installing torch 2.11.0 and Triton 3.6.0 into $(REFERENCE) (about 5 GB, two minutes) ..."
	@$(PYTHON312) -m venv --clear $(REFERENCE)
	@grep -v -E '^(torch|triton)==' constraints.txt > $(REFERENCE)/constraints.txt
	@$(REFERENCE)/bin/pip install --quiet --disable-pip-version-check --constraint $(REFERENCE)/constraints.txt torch==2.11.0 triton==3.6.0 numpy safetensors filelock pillow opencv-python-headless hypothesis pytest pytest-xdist
	@touch $@

REFERENCE_PYTEST = $(PYTEST:$(BIN)/python=$(REFERENCE)/bin/python)
test-reference: $(INSTALLED)  ## operators, step, layout and compilation with torch 2.11 and Triton 3.6, the oldest supported
	@TRITON_INTERPRET=1 $(REFERENCE_PYTEST) tests/kernels/interpreted
	@$(REFERENCE_PYTEST) tests/kernels/test_compile_check.py tests/kernels/test_ops.py tests/kernels/test_gpu.py tests/train/test_step.py tests/test_layout.py
	@$(REFERENCE_PYTEST) -m gpu tests/export/test_tensorrt_plugin.py tests/bench/test_measure.py

# NVIDIA's server as the package nvidia-pytriton carries it, in an environment that also runs the models of its Python
# backend.  That backend misreads arrays of numpy 2; opencv 4.11 is the last that takes numpy 1.
SERVER ?= $(VENV)/server
SERVER_INSTALLED = $(SERVER)/.ready-pytriton-0.7.0
$(SERVER_INSTALLED): | setup
	@echo "Installing Triton Inference Server 2.51.0 into $(SERVER) (about 500 MB, a minute) ..."
	@$(BIN)/python -m venv --clear $(SERVER)
	@grep -v -E '^(numpy|opencv-python-headless)==' constraints.txt > $(SERVER)/constraints.txt
	@$(SERVER)/bin/pip install --quiet --disable-pip-version-check --no-deps --constraint $(SERVER)/constraints.txt nvidia-pytriton==0.7.0 numpy==1.26.4 opencv-python-headless==4.11.0.86 onnxruntime flatbuffers packaging protobuf
	@touch $@

test-server: $(SERVER_INSTALLED)  ## repository and client with NVIDIA's Triton Inference Server itself, on a CPU
	@DTN_TRITON_SERVER=$(abspath $(SERVER)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/export/test_triton_server.py $(ARGS)

lint: setup  ## ruff, mypy, and which folder may import which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## let ruff mend what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: setup  ## this machine's figures into bench/results, and the tables made of them: minutes
	@$(BIN)/dtn-fast bench model train data kernels tables --budget 540 $(ARGS)

GPU = $(PYTHON) -m dtn_fast.bench.gpu
gpu: torch  ## test, tune and measure on a GPU; STAGE="kernels model" BUDGET=540 OUT=folder; installs nothing
	@DTN_COMMIT=$(COMMIT) $(GPU) $(if $(STAGE),--stage $(STAGE)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out $(OUT)) $(ARGS)

MINUTES = 30
gpu-plan: torch  ## the calls of make gpu for a machine that is lent for MINUTES (30)
	@$(GPU) --plan $(MINUTES) $(if $(STAGE),--stage $(STAGE))

gpu-collect: torch  ## merge what make gpu left in the folder FROM, on any machine, into the checkout
	@$(GPU) --collect $(FROM)

.PHONY: torch
torch:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch; name one that has: make gpu PYTHON=$(BIN)/python"; exit 2; }

clean:  ## remove the environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
