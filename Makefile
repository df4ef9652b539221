# make train   set up, then train the default model on real text (about three minutes on a laptop)
# make test    set up, then run the tests
# make setup   set up only: .venv with pinned versions
# make checkpoints   set up, then train again the small models that the notebooks and docs/probes.md look into
# make docs          set up, then build the documentation site into build/site, without network
# make probes        set up, then run every probe on them: results in runs/probes, figures of docs/probes.md anew
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
STAMP := $(VENV)/.installed

.PHONY: train test test-slow setup lint docs native checkpoints probes clean

train: setup
	@echo "training takes one to two minutes on two cores; Ctrl-C stops it, and the last line says how to go on"
	$(BIN)/python train.py model=moe_mamba

# one thread per worker: tests are small, and threads of several workers would wait for each other
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: setup
	$(BIN)/python tools/pages/build.py

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt tools/setup_venv.py $(wildcard ssmzoo/ops/*/*.c ssmzoo/ops/*/*.h)
	$(PYTHON) tools/setup_venv.py $(VENV)
	@touch $(STAMP)

native: setup
	$(BIN)/python -m ssmzoo.ops.native.build

checkpoints: setup
	$(BIN)/python notebooks/make_checkpoints.py

probes: setup
	$(BIN)/python notebooks/run_probes.py

clean:
	rm -rf $(VENV) build dist *.egg-info
