VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# One thread: OpenMP teams of several processes fight over the cores, and results repeat. No network in tests.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format bench lab docs

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

$(DOCS_STAMP): $(STAMP) pyproject.toml requirements/constraints.txt
	$(PYTHON_BIN) -m pip install -qq --disable-pip-version-check --no-warn-conflicts -c requirements/constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_STAMP) ## the documentation as a site, in site/ (open site/index.html); warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON_BIN) -m mkdocs build --strict
