# Every target makes .venv and installs into it first, once for each change of the metadata.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test lint docs bench zoo accuracy clean

# Where other work shares the cores, threads that spin while they wait make training 5 times slower.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/digits_resnet18.py

# One torch thread for each test process: they share the cores already.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Offline, with warnings as errors: build/docs/index.html.
docs: $(STAMP)
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(STAMP)
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/speedup_time.py

# ARGS="--group timm" for a part of it.
zoo: $(STAMP)
	$(BIN)/pip install --quiet -e ".[zoo]"
	$(BIN)/python benchmarks/zoo.py $(ARGS)

# ARGS="--seeds 20 --pruners L1 Taylor"; a run that was stopped goes on where it was.
accuracy: $(STAMP)
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/accuracy.py --jobs $(JOBS) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.cfg setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -e ".[demo,test,dev]"
	touch $@
