# `make help` lists what can be done; every target sets up its own environment in .venv (see .ci/setup).

PRESET ?= lora_zero2
MODEL ?=
ARGS ?=

export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Kept bytecode halves the imports of every process: uv compiles nothing when it installs.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup:  ## install everything into .venv and build DeepSpeed's ops
	@bash .ci/setup

# Offload needs more of DeepSpeed's ops than the other presets do, and they take minutes to build.
DEMO_OPS := shm_comm $(if $(findstring offload,$(PRESET))$(findstring nvme,$(PRESET)),cpu_adam pin_memory) \
	$(if $(findstring nvme,$(PRESET)),async_io)

demo:  ## fine-tune, evaluate with vLLM, export, serve: make demo [PRESET=lora_zero2] [MODEL=folder or hub id] [ARGS=...]
	@OPS="$(DEMO_OPS)" bash .ci/setup
	@.venv/bin/python recipes/demo.py --ds_preset $(PRESET) $(if $(MODEL),--model $(MODEL)) $(ARGS)

test:  ## lint and the fast tests: make test [ARGS="-k presets"]
	@bash .ci/test $(ARGS)

test-all:  ## lint and every test, as continuous integration runs them
	@bash .ci/test --all $(ARGS)

lint: setup  ## ruff and the import contracts
	@ruff check . && ruff format --check . && lint-imports --no-logo

format: setup  ## let ruff rewrite what it can
	@ruff check --fix . && ruff format .

clean:  ## remove the environment, built ops, runs and caches of this checkout
	rm -rf .venv .cache build dist runs .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
