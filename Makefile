# make train   set up, prepare the embedded digits, train the preset seed-mlp with two workers
# make test    set up, run every test; those with a real Ray wait a lot, so they run beside the others
# make chaos   the full set: hundreds of kills, of Ray and its nodes too, sweeps and monitoring on a real Ray; about an hour
# make check   lint, format and type checks
# make clean   remove the environment, the data and the runs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test chaos check format clean
.DEFAULT_GOAL := train

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name it with make PYTHON=…"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

train: $(READY)
	$(BIN)/vaegan-dist prepare digits data/digits
	$(BIN)/vaegan-dist train --preset seed-mlp --data data/digits --address local

test: $(READY)
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest -m "ray and not chaos" > .venv/ray-tests.log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest -m "not ray and not chaos"; rest=$$?; \
	echo "tests with a real Ray:"; wait $$ray; code=$$?; cat .venv/ray-tests.log; exit $$((rest + code))

chaos: $(READY)
	$(BIN)/python -m pytest -m chaos -s tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv data runs
