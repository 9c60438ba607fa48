PYTHON ?= python3
BIN := .venv/bin
# make demo TORCH=cpu: PyTorch without CUDA, a quarter of the disk. On macOS there is no other.
INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)

# uv, which make lowest installs with, would take the other packages from that index too; it has an option for torch.
UV_INDEX := $(if $(filter cpu,$(TORCH)),--torch-backend cpu)
LOWEST_PYTHON ?= python3.10

.PHONY: demo test lint lowest clean

demo: .venv/installed  ## sample faces, stage 1, stage 2, evaluation: about 5 minutes on 2 cores
	$(BIN)/python demo.py

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

lowest: .venv-lowest/installed  ## the tests on the lowest Python and the lowest versions of requirements*.txt
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

# The stamp is written last: an interrupted installation is done again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(INDEX) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

.venv-lowest/installed: requirements.txt requirements-dev.txt
	$(LOWEST_PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct $(UV_INDEX) \
	    -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-lowest demo_output
