# make quickstart   set up, then train on the embedded images, evaluate, and write runs/quickstart/report.html
# make test         set up, then run the test suite
# make check        format, lint, types, and the tests (the import levels are one of them)
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN = $(VENV)/bin

.PHONY: quickstart test check lint format clean

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/dino-simpool synthetic --out $(RUN)/data
	$(BIN)/dino-simpool train --config quickstart --run.out $(RUN) --data.root $(RUN)/data/train \
		--run.knn_train $(RUN)/data/train --run.knn_val $(RUN)/data/val
	$(BIN)/dino-simpool knn --checkpoint $(RUN)/last.pth --data $(RUN)/data
	$(BIN)/dino-simpool knn --checkpoint $(RUN)/last.pth --data $(RUN)/data --which untrained
	$(BIN)/dino-simpool knn --checkpoint $(RUN)/last.pth --data $(RUN)/data --features pixels
	$(BIN)/dino-simpool masks --checkpoint $(RUN)/last.pth --data $(RUN)/data
	$(BIN)/dino-simpool masks --checkpoint $(RUN)/last.pth --data $(RUN)/data --which untrained
	$(BIN)/dino-simpool report --out $(RUN) --data $(RUN)/data

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test

clean:
	rm -rf $(VENV) $(RUN) build *.egg-info
