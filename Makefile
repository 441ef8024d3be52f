# Each target sets up what it needs in .venv; only Python 3.11 or newer must be there.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OFFLINE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := $(OFFLINE) $(BIN)/python -m pytest -q -rfEs --durations=10

.PHONY: help demo rlhf test test-slow lint tiny clean

help:
	@echo "make demo       train, prefer, measure, compare: a few minutes on two CPU cores"
	@echo "make rlhf       one tuned model, then PPO, DPO, GRPO, best of n: what each gains and costs; ten minutes"
	@echo "make test       the fast tests"
	@echo "make test-slow  learning curves, equivalences, resume, several processes; GPU tests where there is one"
	@echo "make lint       ruff: rules and format"
	@echo "make tiny       rebuild data/tiny, the embedded model and rows"
	@echo "make clean      remove .venv, caches and builds; outputs/ stays"

demo: $(STAMP)
	$(BIN)/python eval/demo.py

rlhf: $(STAMP)
	$(BIN)/python eval/rlhf.py

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m "slow or gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tiny: $(STAMP)
	$(BIN)/python data/make_tiny.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch alone first: where a CPU build of the pinned version is offered, nothing else asks for another one.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11")'
	@echo "installing the tested versions into .venv: a minute or a few, the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@
