# The project from a fresh clone, in a virtual environment of its own; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test soak bench kernels check clean

PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3),python3)
TORCH := torch==2.13.0
TRITON := triton==3.7.0
DEEPSPEED := deepspeed==0.19.8

# The environment is right when a stamp with this key exists; a moved checkout, another Python or other requirements change it.
MADE_BY := $(shell $(PYTHON) --version 2>&1) at $(CURDIR)
KEY := $(shell { cat setup.py pyproject.toml; echo "$(MADE_BY) $(TORCH) $(TRITON) $(DEEPSPEED)"; } | sha256sum | cut -c1-16)
STAMP := .venv/stamp-$(KEY)

# DeepSpeed looks for ninja on PATH, so the environment must be on it even where it is not activated.
ENTER := export PATH="$(CURDIR)/.venv/bin:$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1;

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

train: $(STAMP) ## train a small MoE language model with DistMuon, then with AdamW, on 2 CPU ranks; compare both
	@$(ENTER) export NPROC=2 CUDA_VISIBLE_DEVICES=; set -x; \
	launch/local.sh train configs/runs/moe_mini.toml --resume auto; \
	launch/local.sh train configs/runs/moe_mini_adamw.toml --resume auto; \
	python -m distmuon report runs/moe_mini-distmuon runs/moe_mini-adamw

test: $(STAMP) ## run every test that needs no GPU; ARGS="-k plan" passes options to pytest
	@$(ENTER) python -m pytest $(ARGS)

soak: $(STAMP) ## hours: the long tests of faults, mutants, kills for 30 minutes, docs/reliability.md; ARGS="mutants" runs one
	@$(ENTER) python -m tests.soak $(ARGS)

bench: $(STAMP) ## bytes, memory, step time, link speeds and Newton-Schulz beside others'; ARGS="ns --quick" runs one
	@$(ENTER) $(if $(ARGS),python -m distmuon bench $(ARGS),set -x; \
	for name in comm memory step links ns; do python -m distmuon bench $$name; done)

kernels: $(STAMP) ## compile every Triton kernel for sm_80, sm_90, sm_100, gfx942, gfx950 without a GPU; check registers, spills, loads
	@$(ENTER) python -m distmuon bench kernels $(ARGS)

check: $(STAMP) ## ruff, mypy --strict, import-linter and the size rules
	@$(ENTER) failed=(); \
	for command in "ruff check ." "ruff format --check ." "mypy --strict distmuon kernels" lint-imports \
	    "python tests/house/size_rules.py"; do \
	    echo "+ $$command"; $$command || failed+=("$$command"); \
	done; \
	(( $${#failed[@]} == 0 )) || { printf 'failed: %s\n' "$${failed[@]}" >&2; exit 1; }

clean: ## remove .venv, caches and build products; runs/ is kept
	rm -rf .venv build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The pinned torch goes first: any later requirement is then satisfied and pulls no other build of several GB.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $(PYTHON) is \"$(shell $(PYTHON) --version 2>&1)\", but distmuon needs Python 3.11 or newer;" \
	        "install one or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@command -v gcc >/dev/null || { \
	    echo "make: gcc is not on PATH, but DeepSpeed and Triton compile with it; install gcc." >&2; exit 1; }
	@rm -f .venv/stamp-*
	@[[ "$$(cat .venv/made-by 2>/dev/null)" == "$(MADE_BY)" ]] || { \
	    echo "+ $(PYTHON) -m venv .venv"; $(PYTHON) -m venv --clear .venv; echo "$(MADE_BY)" >.venv/made-by; }
	@$(ENTER) set -x; \
	python -m pip install -qq $(TORCH); \
	python -m pip install -qq $(TRITON); \
	python -m pip install -qq $(DEEPSPEED); \
	python -m pip install -qq --editable '.[dev,hf]'
	@touch $@
