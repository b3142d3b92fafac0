# Every target sets up what it needs: .venv with the tested versions, from the package index alone.
#   make demo   train, stop, resume in another layout; 4 to 6 minutes on 2 CPU cores, or on GPUs
#   make test   what CI runs: check and all tests
#   make check  ruff and mypy
#   make bench  training speed on this CPU, beside transformers'
#   make clean  removes .venv and caches; data/ and outputs/ stay
# PYTHON=... chooses the interpreter, ARGS=... goes to pytest or the benchmark, WORKERS=... to pytest.

PYTHON ?= python3.12
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_cpu.py $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
