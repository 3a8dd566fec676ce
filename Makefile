# make demo: set up, then fine-tune two real models.  make test: set up, then every check there is.
# make test-oldest: the tests on the oldest supported versions of the libraries, in an environment of their own.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

OLDEST := .venv-oldest

.PHONY: demo test test-oldest check fuzz kills bench format clean

demo: $(READY)
	$(BIN)/hatrack demo

test: $(READY)
	$(MAKE) check

test-oldest: $(OLDEST)/.ready
	HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=3000 $(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile

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
	$(call set-up,.venv,constraints.txt)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(call set-up,$(OLDEST),constraints-oldest.txt)

# set-up FOLDER CONSTRAINTS: an environment with hatrack and what its checks need
define set-up
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"hatrack needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable '.[dev,quantize]'
	touch $(1)/.ready
endef

clean:
	rm -rf .venv $(OLDEST) hatrack-demo
