# make demo · make test · make lab — each makes .venv first when it is missing or older than pyproject.toml.
#   PYTHON=python3.12                                       another interpreter for .venv
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu        PyTorch's small wheels for machines without a GPU
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
RUNS := runs

.PHONY: help demo test lab sync clean

help:
	@echo "make demo   set up, then run the whole network's chapter and name the notebook to open"
	@echo "make test   set up, then run everything that must pass"
	@echo "make lab    set up, then open the chapters in JupyterLab"
	@echo "make sync   after editing a chapter: export modules, clean notebooks, write links and README.md"
	@echo "make clean  remove .venv and what the other targets made"

$(READY): pyproject.toml
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
	  echo "QTSeg needs Python 3.10 or newer; '$(PYTHON)' is not: install one, or name it with PYTHON=..." >&2; exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	  echo "==> $(PYTHON) cannot make virtual environments; installing python3-venv with apt-get"
	  sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi
	  $$sudo apt-get update -q && $$sudo apt-get install -qy python3-venv
	fi
	echo "==> Making .venv with $$($(PYTHON) --version) (2 to 5 minutes, 6 GB; PyTorch is most of it)"
	rm -f $(READY)
	if [ "$$($(BIN)/python -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" != "$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')" ]; then
	  $(PYTHON) -m venv --clear .venv
	fi
	$(BIN)/python -m pip install --quiet --upgrade pip
	if [ -n "$(TORCH_INDEX)" ]; then
	  echo "==> Installing torch and torchvision from $(TORCH_INDEX)"
	  $(BIN)/python -m pip install --quiet torch torchvision --index-url "$(TORCH_INDEX)"
	fi
	echo "==> Installing qtseg and its development requirements"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip check
	touch $(READY)
	echo "==> .venv is ready"

demo: $(READY)
	@mkdir -p $(RUNS)
	echo "==> Executing nbs/08_model.ipynb: the whole network, block by block, on the CPU"
	$(BIN)/papermill --log-level ERROR --kernel python3 --cwd nbs nbs/08_model.ipynb $(RUNS)/08_model.ipynb
	echo "==> Done. Open $(RUNS)/08_model.ipynb (make lab opens JupyterLab): shapes, pictures, golden numbers, speed."

test: $(READY)
	@echo "==> Running everything that must pass: repository, chapters, network, checkpoints"
	$(BIN)/python -m pytest

lab: $(READY)
	@echo "==> Opening the chapters in JupyterLab; start with index.ipynb, stop with Ctrl-C"
	$(BIN)/jupyter lab --notebook-dir nbs $(LAB_OPTIONS)

sync: $(READY)
	@$(BIN)/python tools/notebooks.py

clean:
	rm -rf .venv $(RUNS) build *.egg-info .pytest_cache .ruff_cache
