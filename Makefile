# Each target sets up what it needs: a .venv pinned by constraints.txt, and pyseq in it with its C++ extension.
# ROOM=<room> narrows test, test-slow, bench, aot and gpu to one room: tests whose file, name or ROOM says so. ARGS go along.
# Tests run on JOBS processes. STUDY=<name>: the study examples/*<name>.py.
PYTHON ?= python3
JOBS ?= 2
STUDY ?= chain_heads
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/* csrc/*/*) setup.py pyproject.toml constraints.txt
AMD_TRITON := 3.8.0
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo study test test-slow gpu bench aot lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/people_daily_tagger.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(if $(ROOM),-k "$(ROOM)") $(ARGS)

# all that need no GPU, also those that compare with other packages or read data sets
test-slow: $(VENV)/.dev $(VENV)/.peers $(VENV)/.study
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not gpu' $(if $(ROOM),-k "$(ROOM)") $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/text_law.py

study: $(VENV)/.study
	$(BIN)/python $(or $(wildcard examples/*$(STUDY).py),$(error no examples/*$(STUDY).py)) $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python bench $(ROOM) $(ARGS)

# with PYTHON's own torch and triton, on a machine with a GPU and no network; results under $$OUT, or build/gpu
gpu:
	$(PYTHON) tests/gpu.py $(ROOM) $(ARGS)

# the table in docs, about a quarter of an hour; `make aot TRITON=3.6.0` only tries that release
ifdef TRITON
aot: $(VENV)/.dev build/triton-$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) TRITON_CACHE_DIR=build/triton-$(TRITON)/.cache \
		$(BIN)/python tests/aot.py $(ROOM) $(ARGS)
else
aot: $(VENV)/.dev
	$(BIN)/python tests/aot.py $(ROOM) --docs --targets sm_80 sm_90 sm_100 $(ARGS)
	$(MAKE) aot TRITON=$(AMD_TRITON) ARGS='--docs --targets gfx942 $(ARGS)'
endif

build/triton-%:
	rm -rf $@.part
	PIP_CONSTRAINT= $(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$*
	mv $@.part $@

# an extra a stamp; torch first, at its pin, and seqeval, whose build wants tools of its own
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel pybind11
	$(BIN)/python -m pip install --quiet torch $(if $(filter peers,$*),seqeval)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyseq/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
