# make demo: set up, then fine-tune two real models.  make test: set up, then every check there is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check fuzz kills bench format clean

demo: $(READY)
	$(BIN)/hatrack demo

test: $(READY)
	$(MAKE) check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=3000 $(BIN)/python -m pytest -q -n 2 --dist loadfile

fuzz: $(READY)
	HF_HUB_OFFLINE=1 HATRACK_FUZZ=$${HATRACK_FUZZ:-1500} $(BIN)/python -m pytest -q tests/fuzz

kills: $(READY)
	$(BIN)/python tests/reliability/kill.py --kills 30

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python bench/speed.py --runs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m hatrack.cli.options docs/options.md
	$(BIN)/python -m tests.rooms

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"hatrack needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,quantize]'
	touch $(READY)

clean:
	rm -rf .venv hatrack-demo
