# Every target makes its own environment in .venv when there is none. Set PYTHON to choose an interpreter, or VENV to
# use an environment you have. pip would compile the installed modules on one core.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
OUT ?= out/demo

.PHONY: demo test check bench bench-quick bench-peers train docs smoke clean

demo: $(STAMP)
	$(BIN)/mixdq demo --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	mkdir -p $(dir $(OUT))
	$(BIN)/python -m pytest benchmarks -m "not gpu" --benchmark-only -s --benchmark-json=$(dir $(OUT))bench.json

# Ratios against those of record, of the same machine only.
bench-quick: $(STAMP)
	mkdir -p $(dir $(OUT))
	$(BIN)/python -m pytest benchmarks -m quick --benchmark-only -s --benchmark-json=$(dir $(OUT))quick.json
	$(BIN)/python -m benchmarks.compare benchmarks/results/quick.json $(dir $(OUT))quick.json

# The peers' own packages need an environment of their own.
bench-peers:
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e ".[test]" -r benchmarks/peers/requirements.txt
	.venv-peers/bin/python -m benchmarks.peers

train: $(STAMP)
	$(BIN)/python -m examples.shapes.train

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

smoke: $(STAMP)
	$(BIN)/python tests/smoke.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test,dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some modules are templates, or for other Pythons
	touch $(STAMP)

clean:
	rm -rf out build *.egg-info
