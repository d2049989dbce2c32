# `make demo` and `make test` set everything up in .venv by themselves. TORCH_INDEX may name another wheel index,
# such as https://download.pytorch.org/whl/cpu.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-long docs lint format clean

demo: $(VENV)/.serve
	$(BIN)/flora demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(VENV)/.dev
	FLORA_FULL=1 $(BIN)/python -m pytest --timeout 3600

# The documentation as a site, in build/site
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.pip:
	$(PYTHON) -c 'import sys; sys.exit("Flora needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.serve: $(VENV)/.pip $(INPUTS)
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve $(INPUTS)
	$(PIP) --group dev
	@touch $@
