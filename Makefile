# make quickstart   set up, then train on the embedded images, evaluate, and write runs/quickstart/report.html
# make test         set up, then run the test suite
# make test-oldest  set up with the lowest versions that setup.cfg allows, then run golden figures, resume and short trainings
# make test-slurm   install a SLURM of one node (Debian, as root) and run jobs on it; `make test` does so where it is installed
# make test-long    the tests that take minutes each
# make check        format, lint, types, the tests (the import levels are one of them), and test-oldest
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN = $(VENV)/bin
OLDEST_PYTHON ?= python3.11
OLDEST_VENV ?= .venv-oldest
OLDEST_TESTS ?= tests/models tests/dino tests/test_release_0_1.py \
	tests/test_train.py::test_files_and_log_of_a_run \
	tests/test_train.py::test_stopped_after_every_step_and_resumed \
	tests/test_train.py::test_two_processes_stopped_and_resumed

.PHONY: quickstart test test-slurm test-long install-oldest test-oldest check lint format clean

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Every `>=` of setup.cfg is `==` here: the installation fails if a lowest version cannot be had (no network, no build
# for this Python) or does not fit the others. It is the whole CUDA build of torch, 6 GB: uv fetches it several times
# faster than pip.
$(OLDEST_VENV)/installed: setup.cfg pyproject.toml
	rm -rf $(OLDEST_VENV)
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	sed -n 's/^ *\([^ =>]*\)>=/\1==/p' setup.cfg > $(OLDEST_VENV)/versions.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet uv
	$(OLDEST_VENV)/bin/uv pip install --quiet --python $(OLDEST_VENV) --editable ".[dev]" --constraint $(OLDEST_VENV)/versions.txt
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

test-slurm: $(VENV)/installed
	tests/slurm/one_node.sh install
	$(BIN)/python -m pytest tests/slurm

test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

install-oldest: $(OLDEST_VENV)/installed

test-oldest: install-oldest
	$(OLDEST_VENV)/bin/python -m pytest $(OLDEST_TESTS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test install-oldest test-oldest

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(RUN) build *.egg-info
