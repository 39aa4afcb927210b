VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One thread: OpenMP teams of several processes fight over the cores, and results repeat. No network in tests.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format bench lab

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(STAMP): pyproject.toml scripts/install.sh $(wildcard requirements/*.txt)
	@./scripts/install.sh

install: $(STAMP) ## create .venv: CUDA builds where an NVIDIA GPU is seen, else CPU builds

quickstart: $(STAMP) ## train a small pretrained model with entropy control and draw what happened
	$(PYTHON_BIN) scripts/quickstart.py $(ARGS)

test: $(STAMP) ## the tests, without a GPU (ARGS="-m slow" for the long ones)
	$(TEST_ENV) $(PYTHON_BIN) -m pytest $(ARGS)

check: $(STAMP) ## format, lint, types, import rule
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(TEST_ENV) $(PYTHON_BIN) -m pytest -q tests/test_imports.py

format: $(STAMP) ## rewrite the code the way `make check` wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lab: $(STAMP) ## entropy collapse and what holds it: all methods, one page, resumable (ARGS=--quick: 5 minutes)
	$(PYTHON_BIN) scripts/entropy_lab.py $(ARGS)

bench: $(STAMP) ## where the time of one training step goes
	$(PYTHON_BIN) scripts/bench_step.py $(ARGS)
