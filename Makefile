# make train: install, train a small PGDN on real text, sample from it.   make test: install, run the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/make-train

.PHONY: install train test lint types api faults clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pdn needs Python >= 3.11, found " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: install
	$(BIN)/python train.py name=make-train model=pgdn_tiny data=text trainer.steps=100 eval.every=25 eval.max_samples=64 checkpoint.every=50
	@echo
	$(BIN)/python scripts/generate.py run=$(RUN) prompt='def ' max_new_tokens=120
	@echo
	@echo 'Continue with the same model on your own text, for longer:'
	@echo '  $(BIN)/python train.py model=pgdn_tiny data=text data.path=<directory of text, jsonl or parquet> trainer.steps=2000'

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[types]'
	$(BIN)/pyright --pythonpath $(BIN)/python

api: install
	$(BIN)/python .ci/api build/api

faults: install
	PDN_FAULT_TABLE=docs/reliability.md $(BIN)/python -m pytest -m slow -n 2 --dist worksteal tests/faults

clean:
	rm -rf $(VENV) *.egg-info build
