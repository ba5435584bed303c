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

# OpenMP's waiting threads soon sleep: other programs may need their cores (nbs/reference/training_hardware.ipynb).
export GOMP_SPINCOUNT ?= 10000

MAKEFLAGS += --jobs=2
.PHONY: help demo browser test audit lab mlflow site sync clean

help:
	@echo "make demo   set up, then train on phantom images, evaluate, and name the notebook and the figures to open"
	@echo "make test   set up, then run everything that must pass"
	@echo "make audit  look for unsafe code (ruff's S rules) and for requirements with known vulnerabilities (pip-audit, which asks PyPI)"
	@echo "make lab    set up, then open the front page and the lessons in JupyterLab"
	@echo "make mlflow open the tracked runs (track: true) in the browser"
	@echo "make site   build the book as web pages: build/site/index.html"
	@echo "make sync   after editing a notebook: export modules, clean notebooks, write links and README.md"
	@echo "make clean  remove .venv and what the other targets made"

$(READY): pyproject.toml
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
	  echo "QTSeg needs Python 3.10 or newer; '$(PYTHON)' is not: install one, or name it with PYTHON=..." >&2; exit 1
	fi
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	  echo "==> $(PYTHON) cannot make virtual environments; installing python3-venv with apt-get"
	  sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi
	  $$sudo apt-get -o DPkg::Lock::Timeout=300 update -q && $$sudo apt-get -o DPkg::Lock::Timeout=300 install -qy python3-venv
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
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	$(BIN)/python -m pip check
	# pip would compile one file after the other; here all cores do. Files that are no Python 3 and the packages' own tests do not matter.
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true
	touch $(READY)
	echo "==> .venv is ready"

demo: $(READY)
	@mkdir -p $(RUNS)
	rm -rf $(RUNS)/demo $(RUNS)/demo.ipynb
	echo "==> Training on phantoms: nbs/experiments/train.ipynb with params/demo.yaml (2 to 3 minutes on 2 cores)"
	# What the notebook prints goes to the terminal too: a line for each epoch. papermill's own bar counts cells only.
	$(BIN)/papermill --log-level ERROR --no-progress-bar --stdout-file - --kernel python3 nbs/experiments/train.ipynb $(RUNS)/demo.ipynb -f nbs/experiments/params/demo.yaml -p runs $(RUNS)
	$(BIN)/python -c 'import json; test = json.load(open("$(RUNS)/demo/metrics.json"))["test"]; print("==> Test Dice %.2f, IoU %.2f on phantoms that training never saw" % (test["dice"], test["iou"]))'
	echo "==> Open the executed notebook $(RUNS)/demo.ipynb (make lab), and the figures $(RUNS)/demo/masks.png and $(RUNS)/demo/curves.png"

# Beside the virtual environment: both wait for downloads. `make` runs two rules at once where they do not need each other.
browser:
	@if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null; then
	  echo "==> Installing chromium with apt-get: the widgets are tested in a real browser"
	  sudo=; if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi
	  apt="$$sudo apt-get -o DPkg::Lock::Timeout=300"
	  $$apt update -q && $$apt install -qy --no-install-recommends chromium >/dev/null || echo "==> chromium could not be installed: the browser's tests will be skipped"
	fi

test: $(READY) browser
	@echo "==> Running everything that must pass: repository, lessons, reference, network, data, training, evaluation, prediction, export, widgets"
	# One thread for each process: twice as fast as two for one. Bytecode is kept, for a hundred processes import the package.
	# A worker more than CPUs, for tests that wait: for a browser, a kernel, a lock. Four at most, for each needs memory.
	workers=$$($(BIN)/python -c 'import os; print(min(len(os.sched_getaffinity(0)) + 1, 4))')
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$workers --dist worksteal

audit: $(READY)
	@echo "==> Unsafe code: ruff's S rules; exceptions and their reasons stand in pyproject.toml"
	$(BIN)/ruff check --select S --exclude _modidx.py qtseg tools data_scripts
	echo "==> Requirements with known vulnerabilities: pip-audit"
	$(BIN)/python tools/audit.py

lab: $(READY)
	@echo "==> Opening the lessons in JupyterLab; stop with Ctrl-C"
	$(BIN)/jupyter lab $(LAB_OPTIONS) nbs/index.ipynb

mlflow: $(READY)
	@if [ ! -f $(RUNS)/mlflow.db ]; then echo "$(RUNS)/mlflow.db is not there: train with track: true first" >&2; exit 1; fi
	echo "==> Opening the tracked runs at http://127.0.0.1:5000; stop with Ctrl-C"
	$(BIN)/mlflow ui --backend-store-uri "sqlite:///$$PWD/$(RUNS)/mlflow.db"

.venv/.site: $(READY)
	@echo "==> Installing what builds the book"
	$(BIN)/python -m pip install --quiet --group site
	touch $@

site: .venv/.site
	@rm -rf build/site site/api
	echo "==> Building the book from the notebooks as they are committed; a warning or a dead link is an error"
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --jobs auto -c site -d build/doctrees . build/site
	cp build/site/README.html build/site/index.html
	echo "==> Writing the live demo"
	$(BIN)/python site/demo.py build/site/demo
	echo "==> Following every link within the site"
	$(BIN)/python site/links.py build/site
	echo "==> Open build/site/index.html"

sync: $(READY)
	@$(BIN)/python tools/notebooks.py

clean:
	rm -rf .venv $(RUNS)/* site/api build *.egg-info .pytest_cache .ruff_cache
