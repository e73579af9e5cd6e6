# Each target sets up what it needs: a .venv pinned by constraints.txt, and pyseq in it with its C++ extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo study test test-slow test-gpu bench aot lint wheel clean

demo: $(VENV)/.ready
	$(BIN)/python examples/people_daily_tagger.py $(ARGS)

study: $(VENV)/.ready
	$(BIN)/python examples/people_daily_heads.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(VENV)/.ready
	$(BIN)/python bench chain $(ARGS)

aot: $(VENV)/.ready
	$(BIN)/python tests/aot.py $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/text_law.py

# torch first, at its pin, and seqeval, whose build wants tools of its own; the rest builds with what is here.
$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(BIN)/python -m pip install --quiet torch seqeval
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[bench,demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyseq/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
