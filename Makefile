# Everything sets itself up in .venv: a fresh machine needs git, make and Python >= 3.10 with venv.
#   make demo    an SD1.5-shaped UNet under stock and under asynchronous moving: table, timeline, trace in demo/
#   make test    lint and tests: files side by side on all cores, those that need a GPU one after the other
#   make soak    jobs with random events under the judges, for a quarter of an hour or so; PASSES=N for more or fewer
#   make lint    ruff only
#   make clean   remove .venv, caches and demo/
PYTHON ?= python3
TORCH ?= torch==2.13.0
PASSES ?= 20000
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready

.PHONY: demo test soak lint clean

demo: $(DEMO_READY)
	$(BIN)/python -m lib_async_lowvram demo --out demo

test: lint
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu"

soak: $(TEST_READY)
	$(BIN)/python -m tests.soak --passes $(PASSES)

lint: $(TEST_READY)
	$(BIN)/python -m ruff check .

# The stamps are renewed when pyproject.toml or this file changes; otherwise a second run starts at once.
$(DEMO_READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3.10 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[demo]"
	touch $@

$(TEST_READY): $(DEMO_READY)
	$(PIP) install --quiet --editable ".[demo,test,standalone,offload]"
	touch $@

clean:
	rm -rf $(VENV) .venv-py310 .venv-browser demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
