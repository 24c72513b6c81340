# SPDX-License-Identifier: Apache-2.0
# `make demo` runs the main job and `make test` the tests; each sets up all that it needs below build/ (Python 3.11, gcc, make).

PYTHON ?= python3
STOCK ?= 0.11.0
NEWEST := 0.23.0
VENV := build/venv-$(STOCK)
PY := $(VENV)/bin/python
TOOLS := build/tools
UV := $(TOOLS)/bin/uv
REQUIREMENTS := tests/stock/envs/$(STOCK)
NPU_SOURCES := $(shell find tests/virtual_npu -type f -not -name '*.md' -not -path '*/tests/*' -not -name '*.pyc')

BENCH_VERSIONS := 0.11.0 0.13.0 0.23.0

.PHONY: help setup demo test test-newest test-long soak matrix bench bench-cost scale lint clean
help:
	@echo "make demo   prefill/decode pair over HTTP, stock against overlay; writes build/demo/report.json (ARGS=--help)"
	@echo "make test   lint, type check and all default tests"
	@echo "make test-long  the cases that the default run leaves out"
	@echo "make soak   half an hour of mixed load with graphs and requests that are given up; ARGS=\"--minutes 5\""
	@echo "make matrix  all supported stock versions, one after another (some hours); VERSIONS=\"0.18.0 0.23.0\" for some"
	@echo "make bench  stock against overlay on two nodes with a link between them; ARGS='\"0.23.0, async\"' for a part"
	@echo "make bench-cost  what the overlay itself costs, per call and at import"
	@echo "make scale  what the all_reduce costs with 2 to 256 ranks: a model, held against measured times"
	@echo "make lint   ruff and mypy only"
	@echo "make clean  remove build/"

demo: setup
	$(PY) examples/demo.py $(ARGS)

test: setup lint
	$(PY) -m pytest tests --ignore tests/versions $(ARGS)
	$(MAKE) test-newest STOCK=$(NEWEST)

# The quick part of what `make matrix` runs on a version.
test-newest: setup
	$(PY) -m pytest tests/versions

test-long: setup
	$(PY) -m pytest tests -m long $(ARGS)

soak: setup
	$(PY) tests/serve/soak.py $(ARGS)

matrix: setup
	$(PY) tests/versions/matrix.py $(VERSIONS)

bench:
	for version in $(BENCH_VERSIONS); do $(MAKE) setup STOCK=$$version || exit; done
	$(PY) tests/bench/bench.py $(ARGS)

bench-cost: setup
	$(PY) tests/bench/cost.py

scale: setup
	$(PY) tests/bench/scale.py

lint: $(VENV)/.stock
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy dp_sync_patch

setup: $(VENV)/.overlay $(VENV)/.virtual-npu

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "Python 3.11 is needed: '$(PYTHON)' is another version (make PYTHON=...)" >&2; exit 2; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q uv

# The stock wheels exactly as published, and the tools that the tests and the demo use beside them. Compiled once: where
# PYTHONDONTWRITEBYTECODE is set, each of hundreds of processes would do it anew.
$(VENV)/.stock: $(REQUIREMENTS).txt $(REQUIREMENTS)-overrides.txt tests/requirements.txt | $(UV)
	test -x $(PY) || $(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip install -q --compile-bytecode --python $(PY) -r $(REQUIREMENTS).txt -r tests/requirements.txt --overrides $(REQUIREMENTS)-overrides.txt
	touch $@

$(VENV)/.virtual-npu: $(VENV)/.stock $(NPU_SOURCES)
	$(MAKE) -s -C tests/virtual_npu install PYTHON=$(abspath $(PY)) UV=$(abspath $(UV)) BUILD=$(abspath build/virtual_npu/$(STOCK))
	touch $@

# Editable: the overlay under test is the one in this checkout.
$(VENV)/.overlay: $(VENV)/.stock pyproject.toml
	$(UV) pip install -q --python $(PY) --no-deps -e .
	touch $@

clean:
	rm -rf build
