# Everything that a user or developer of turnrow runs. `make help` lists it.
# Needed beforehand: Python >= 3.10 and pip with a package index; the rest goes into .venv.

PYTHON  ?= python3
# Test processes, one thread each. Each holds about 1 GB.
WORKERS ?= 2
# Of `make bench-suite`.
SUITE   ?= minilm
DATA    ?= data
THREADS ?= 1

VENV   := .venv
OLDEST := .venv-oldest
BIN    := $(VENV)/bin
PIP    := -m pip --disable-pip-version-check install --quiet

# Nothing here needs a model hub: the demo's model comes as a Python package, the tests build theirs from configs.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo serve-demo test coverage test-ray test-oldest lint format types bench bench-suite docs check clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## turnrow, its tools and the demo's model into .venv

# Threads that wait without spinning: beside other work on the same cores, spinning makes a step three times as long.
demo: $(VENV)/.installed  ## fine-tune a small pretrained encoder on support tickets: head, RoCoFT and full compared
	@OMP_WAIT_POLICY=passive $(BIN)/python examples/demo.py

serve-demo: $(VENV)/.installed  ## train three small adapters, serve them together, ask each the same questions
	@OMP_WAIT_POLICY=passive $(BIN)/python examples/serve_demo.py

test: $(VENV)/.installed-extras  ## the tests, warnings as errors and the rooms' contracts
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --durations=10

coverage: $(VENV)/.installed-extras  ## the same, and which lines they reach; half as long again
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --cov --cov-report=term --cov-fail-under=90

test-ray: $(VENV)/.installed-extras  ## the tests that start processes of Ray: replicas of the server, a suite of experiments
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/serving/replicas tests/benchmarks/suite/test_runner.py

test-oldest: $(OLDEST)/.installed  ## the tests of what touches peft and transformers, on the oldest supported versions
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses=$(WORKERS) \
		tests/tuners tests/adapters tests/tasks tests/training tests/serving tests/cli

lint: $(VENV)/.installed  ## style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed  ## put style and format right, where a tool can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.installed  ## static types
	@$(BIN)/mypy

bench: $(VENV)/.installed  ## measure the cost of a training step against the frozen model's
	@$(BIN)/python -m benchmarks.step_cost

bench-suite: $(VENV)/.installed  ## real fine-tunings of every method: SUITE=minilm, ablations or small_llama, DATA=the folder of the data sets
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.suite run $(SUITE) --data $(DATA) --threads $(THREADS)
	@$(BIN)/python -m benchmarks.suite report

docs: $(VENV)/.installed-docs  ## the documentation as HTML in build/docs
	@$(BIN)/sphinx-build -W --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

check: test lint types test-ray test-oldest  ## all that has to hold before a change goes in

clean:  ## remove what the other commands made
	rm -rf $(VENV) $(OLDEST) build dist runs/demo runs/serve-demo .coverage .coverage.* coverage.xml htmlcov .pytest_cache .ruff_cache \
		.mypy_cache .hypothesis .import_linter_cache src/*.egg-info

# A stamp is as new as the files that say what to install, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make-venv,$(VENV))
	@echo "installing into $(VENV) (once; a minute or two)"
	@$(BIN)/python $(PIP) -c constraints.txt -e ".[demo,dev,serve]"
	@touch $@

# Optional packages that tests use. Apart from the rest: with torchao installed, peft imports it, which takes seconds and
# prints what it could not load.
$(VENV)/.installed-extras: $(VENV)/.installed
	@$(BIN)/python $(PIP) -c constraints.txt -e ".[quantized,eval,trl,ray]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python $(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call make-venv,$(OLDEST))
	@echo "installing into $(OLDEST) (once; a minute or two)"
	@$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[dev,quantized,serve]"
	@touch $@

define make-venv
@$(PYTHON) -c 'import sys; v = sys.version_info; \
	sys.exit(0 if v >= (3, 10) else "turnrow needs Python 3.10 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
@$(PYTHON) -m venv $(1)
endef
