# make train   set up, prepare the embedded digits, train the preset seed-mlp with two workers
# make test    set up, run every test, in two processes at once: each of them waits a lot, for Ray, ranks and servers
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

# About half of the time; whatever is not named here runs in the other process.
HALF := tests/cluster tests/evaluation tests/k8s tests/monitoring tests/reporting tests/sweeps tests/use

test: $(READY)
	@export OMP_NUM_THREADS=1; \
	$(BIN)/python -m pytest $(HALF) > .venv/tests.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest $(HALF:%=--ignore=%); rest=$$?; \
	echo "the other half:"; wait $$half; code=$$?; cat .venv/tests.log; exit $$((rest + code))

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
