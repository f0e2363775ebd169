# `make train` and `make test` are all a newcomer needs; `make help` lists the rest.
# Kept to what GNU make 3.81, the one on macOS, understands.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The reference implementations live apart: torch is large and serves other Pythons than we do.
ORACLE := .venv-oracle
ORACLE_PY := $(ORACLE)/bin/python
TORCH := 2.13.0
TRANSFORMERS := 5.23.0
ORACLE_INSTALLED := $(ORACLE)/.installed-$(TORCH)-$(TRANSFORMERS)

# Compilers for chips that are not here, apart because jax looks for the chips of those it finds.
# x86-64 Linux only.
AOT := .venv-aot
AOT_PY := $(AOT)/bin/python
AOT_INSTALLED := $(AOT)/.installed

# Files one after the other, as tests/conftest.py has put them. A third worker for two cores, because
# tests wait for processes that they have started.
IN_TURN := -n 3 --dist loadfile --no-loadscope-reorder

PYTHON ?=
TORCH_INDEX ?=
SEED ?=
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv oracle train test thorough parity lint bench plan aot notebook clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

venv: $(INSTALLED) ## .venv with the pinned dependencies (PYTHON=/path/to/python3 to choose one)
	@echo "$(PY) is ready"

train: $(INSTALLED) ## train configs/tiny.py (ARGS="seed=1 run_dir=runs/other" changes it)
	@$(PY) train.py configs/tiny.py $(ARGS)

test: $(INSTALLED) ## the default suite: no network, no torch
	@$(PY) -m pytest $(IN_TURN) $(ARGS)

thorough: $(INSTALLED) ## the default suite's slow companions: every mesh, transport and backend
	@$(PY) -m pytest $(IN_TURN) -m thorough $(ARGS)

parity: $(INSTALLED) $(ORACLE_INSTALLED) ## fresh goldens from transformers (SEED=7), same tests
	@seed="$(SEED)"; seed=$${seed:-$$($(PY) -c 'import secrets; print(secrets.randbelow(2**31))')}; \
	goldens=$$(mktemp -d) || exit 1; trap 'rm -rf "$$goldens"' EXIT; \
	echo "fresh goldens; the same again: make parity SEED=$$seed"; \
	$(ORACLE_PY) tests/oracles/make_golden.py "$$goldens" --seed $$seed --pretrained && \
	$(PY) -m pytest -n 2 tests/test_parity.py tests/test_hf.py tests/oracles -m "" --goldens="$$goldens"

oracle: $(ORACLE_INSTALLED) ## .venv-oracle: torch, transformers (TORCH_INDEX=URL of torch's CPU wheels)
	@echo "$(ORACLE_PY) is ready"

lint: $(INSTALLED) ## ruff: rules, then format
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

bench: $(INSTALLED) $(ORACLE_INSTALLED) ## time a train step against transformers and torch
	@$(PY) benchmarks/train_step.py $(ARGS)

plan: $(AOT_INSTALLED) ## compile large recipes for absent TPUs and GPUs (ARGS=tiny: small ones)
	@$(AOT_PY) benchmarks/plans.py $(ARGS)

aot: $(AOT_INSTALLED) ## compile every kernel for H200 and TPUs, without one
	@$(AOT_PY) tests/kernels/aot_gpu.py
	@$(AOT_PY) tests/kernels/aot_tpu.py

notebook: $(INSTALLED) ## run every notebook from top to bottom, saving nothing
	@for notebook in notebooks/*.ipynb; do \
	  $(PY) -c 'from nbclient.cli import main; main()' "$$notebook" || exit 1; \
	done

clean: ## remove all environments and every cache; runs/ stays
	rm -rf $(VENV) $(ORACLE) $(AOT) .pytest_cache .ruff_cache .hypothesis build dist dsjax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment in folder $(1), unless one is there whose Python starts.
define made
$(1)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
  python="$(PYTHON)"; \
  python=$${python:-$$(sh .ci/find_python 3.12 3.14 python3.13 python3.12 python3)} || exit 1; \
  echo "making $(1) with $$python"; \
  "$$python" -m venv --clear $(1); }
endef

$(INSTALLED): pyproject.toml constraints.txt
	@$(call made,$(VENV))
	@echo "installing the dependencies (about 800 MB, once)"
	@$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# 3.11 made the stored goldens and has a CPU wheel of torch; newer Pythons will do where it has too.
# On Linux torch may come with gigabytes of CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(ORACLE_INSTALLED):
	@$(ORACLE_PY) -c 'import pip' 2>/dev/null || { \
	  python=$$(sh .ci/find_python 3.11 3.11 python3.11 python3 2>/dev/null || \
	    sh .ci/find_python 3.11 4 python3.12 python3.13 python3) || exit 1; \
	  echo "making $(ORACLE) with $$python"; \
	  "$$python" -m venv --clear $(ORACLE); }
	@echo "installing torch $(TORCH) and transformers $(TRANSFORMERS) (about 1.2 GB, once)"
	@$(ORACLE_PY) -m pip install --quiet torch==$(TORCH) \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(ORACLE_PY) -m pip install --quiet transformers==$(TRANSFORMERS) numpy safetensors
	@touch $@

$(AOT_INSTALLED): pyproject.toml constraints.txt
	@$(call made,$(AOT))
	@echo "installing the dependencies and the compilers of TPUs and GPUs (about 2 GB, once)"
	@$(AOT_PY) -m pip install --quiet -c constraints.txt -e '.[aot]'
	@touch $@
