# `make demo` and `make test` set everything up on a fresh machine with python3 and make. `make help` lists the rest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := demo/smollm2-135m-awq
PROMPT ?= What is the capital of France, and what is it known for?

# The transformers releases that `make test-transformers` runs the model tests on, beside the newest in `make test`.
TRANSFORMERS ?= 5.16.0 5.17.0

.PHONY: help demo test test-gpu lint test-wheels test-transformers test-vllm bench bench-kernels kernel-resources rocm-resources \
  clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

demo: $(VENV)/.runtime $(MODEL)  ## quantise a small real model and let it answer
	$(BIN)/awq-rt doctor || true
	$(BIN)/awq-rt generate $(MODEL) "$(PROMPT)" --max-new-tokens 120

# Processes that run tests side by side, a file at a time; each works in one thread.
WORKERS ?= 2

test: $(VENV)/.development lint  ## lint, types, every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-gpu:  ## the tests that need a GPU, with the python3 and the torch of this machine
	PYTHONPATH=.:backends/reference:backends/cuda $(PYTHON) -m pytest tests/gpu

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-wheels: $(VENV)/.development  ## build every distribution and use the wheels in a clean environment
	$(BIN)/python tools/test_wheels.py

test-transformers: $(VENV)/.development  ## the model tests on the older supported transformers
	for version in $(TRANSFORMERS); do \
	  rm -rf $(VENV)-transformers; \
	  $(PYTHON) -m venv $(VENV)-transformers; \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > $$($(VENV)-transformers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth; \
	  $(VENV)-transformers/bin/python -m pip install --quiet -c constraints.txt transformers==$$version; \
	  $(VENV)-transformers/bin/python -m pytest -q tests/test_models.py tests/test_registration.py tests/test_fusion.py \
	    tests/test_generation.py tests/test_offload.py || exit 1; \
	done

# The checkpoint that `make test-vllm` serves.
CHECKPOINT ?= ../shared/checkpoints/smollm2-135m-awq-gemm-g64

test-vllm:  ## serve a checkpoint with vLLM's CPU build and the plugin, in an environment of its own, and check every token
	$(PYTHON) tools/test_vllm.py $(CHECKPOINT) --environment $(VENV)-vllm

bench: $(VENV)/.development  ## the figures of benchmarks/ that need no GPU
	$(BIN)/python tools/bench_reference.py
	$(BIN)/python tools/bench_load.py

bench-kernels:  ## the figures of benchmarks/ that need an NVIDIA GPU, with the python3 and the torch of this machine
	PYTHONPATH=.:backends/reference:backends/cuda $(PYTHON) tools/bench_kernels.py --json benchmarks/kernels-h100.json
	$(PYTHON) tools/tabulate_kernels.py benchmarks/kernels-h100.json
	$(PYTHON) tools/plot_kernels.py benchmarks/kernels-h100.json

kernel-resources: $(VENV)/.development  ## registers, shared memory and spills of every CUDA kernel and target
	$(BIN)/python tools/kernel_resources.py

rocm-resources: $(VENV)/.development  ## registers, LDS, spills and issue shares of every AMD kernel and target
	$(BIN)/python tools/rocm_resources.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-transformers $(VENV)-vllm demo dist build

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV) || { \
	  echo "python3 -m venv failed: on Debian it is the package python3-venv"; \
	  test "$$(id -u)" = 0 && apt-get update -q && apt-get install -qy python3-venv && $(PYTHON) -m venv --clear $(VENV); }

# The CPU backend is C++; where there is no compiler the reference backend serves.
define install-cpu-backend
@if command -v c++ >/dev/null; then $(BIN)/pip install --quiet -c constraints.txt ./backends/cpu; \
else echo "no C++ compiler: awq-rt-cpu is not built, the reference backend serves; on Debian: apt-get install g++"; fi
endef

CPU_SOURCES := $(wildcard backends/cpu/pyproject.toml backends/cpu/CMakeLists.txt backends/cpu/src/* backends/cpu/awq_rt_cpu/*.py)

$(VENV)/.runtime: $(VENV)/bin/pip pyproject.toml backends/reference/pyproject.toml constraints.txt $(CPU_SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e backends/reference -e '.[gguf]'
	$(install-cpu-backend)
	touch $@

$(VENV)/.development: $(VENV)/bin/pip pyproject.toml backends/reference/pyproject.toml constraints.txt $(CPU_SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt -e backends/reference -e backends/cuda -e backends/rocm -e '.[dev]'
	$(BIN)/pip install --quiet --target $(VENV)/llvm --upgrade --python-version 3.12 --ignore-requires-python \
	  --only-binary=:all: --no-deps llvm-nanobind==21.1.6.3  # LLVM's disassembler, for tools/amdsim
	$(install-cpu-backend)
	touch $@ $(VENV)/.runtime

$(MODEL): $(VENV)/.runtime
	$(BIN)/python tools/demo_model.py $(MODEL)
