PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint bench docs

$(BIN)/probmed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test,docs]'
	touch $@

demo: $(BIN)/probmed
	$(BIN)/probmed demo -o probmed-demo

test: $(BIN)/probmed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(BIN)/probmed
	$(BIN)/ruff check .
	$(BIN)/mypy -p probmed
	$(BIN)/mypy tests

bench: $(BIN)/probmed
	$(BIN)/pip install --quiet --editable '.[benchmarks]'
	for table in tissue volumes fields pairs propagation deformation_uncertainty registration_sizes scalar_change scaling gp_prior_vae few_labels uncertainty contrast architectures; do $(BIN)/python -m benchmarks $$table || exit 1; done

docs: $(BIN)/probmed
	$(BIN)/mkdocs build --strict
