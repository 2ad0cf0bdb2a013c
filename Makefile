# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Threads beyond the physical cores make torch slower, not faster.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow test-interop support check fmt clean install

install: $(STAMP)

# torch comes first and by exact version: on Linux with CUDA that is the CUDA build, and where an index offers a CPU wheel of this
# version (CI) it is taken instead of gigabytes of CUDA packages.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not interop and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow"

# Other libraries load what we write. They live in an environment of their own: no one environment satisfies all of their pins and ours.
PEERS := .venv-interop
$(PEERS)/installed: tests/interop/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/interop/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation gptqmodel==7.7.0
	touch $@

test-interop: $(STAMP) $(PEERS)/installed
	BITSMITH_INTEROP_PYTHON=$(CURDIR)/$(PEERS)/bin/python $(BIN)/python -m pytest -m interop -s

# The README's table of what works, from a run of the tests named in tests/support.yaml.
support: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not interop and not gpu" --write-support
	$(BIN)/bitsmith eval report --readme README.md

# mypy follows no editable install whose package is the repository root, so it is shown a directory that holds `bitsmith`.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p $(VENV)/typecheck && ln -sfn $(CURDIR) $(VENV)/typecheck/bitsmith
	cd $(VENV)/typecheck && ../bin/mypy --config-file ../../pyproject.toml --cache-dir ../mypy_cache $(foreach p,kernels quant_formats calibrate kv_quant samplers models serve eval cli,-p bitsmith.$(p))
	$(BIN)/python -m pytest tests/test_layout.py tests/test_kernels.py tests/test_scheduler.py

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info demo-out
