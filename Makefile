PYTHON ?= python3
BIN := .venv/bin
# make demo TORCH=cpu: PyTorch without CUDA, a quarter of the disk. On macOS there is no other.
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test lint clean

demo: .venv/installed  ## sample faces, stage 1, stage 2, evaluation: about 4 minutes on 2 cores
	$(BIN)/python demo.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The stamp is written last: an interrupted installation is done again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(INDEX) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo_output
