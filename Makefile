# Needs Python 3.11 or newer (with venv), git and make. Everything else goes into .venv.
PYTHON ?= python3
BIN    := .venv/bin
UV     := .venv/bin/uv
READY  := .venv/.ready

# Stages and DVC must find this environment's programs by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup repro preset test test-kills test-servers test-backends test-combinations \
        test-fuzz test-load test-install test-containers attack gpu test-all lint coverage docs \
        release lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## create .venv from requirements.txt (the other targets do it when needed)

repro: $(READY) ## fetch the data, bring every stage up to date, register the model
	@vaeflow retrain --pull

preset: $(READY) ## write a preset into params.yaml: make preset NAME=mnist (see presets/)
	@python -m vaeflow.config.edit presets/$(NAME).yaml

# Two workers and more, where there are cores and memory for them. What shares a costly fixture
# stays with one of them. `make test SEED=7` kills and generates otherwise.
SEED   ?= 0
PYTEST := VAEFLOW_TEST_SEED=$(SEED) pytest --numprocesses auto --dist loadgroup

test: lint ## lint, and the tests of everything, in some minutes
	$(PYTEST)

test-kills: $(READY) ## trainings, flows, batch runs and promotions, killed again and again
	$(PYTEST) -m kills

test-servers: $(READY) ## PostgreSQL, tracking servers that stop, Prefect's workers and schedules
	$(PYTEST) -m servers

test-backends: $(READY) ## the same trainings on JAX and on several devices
	$(PYTEST) -m backends

test-combinations: $(READY) ## every combination of likelihood, binarize, prior, objective, network
	$(PYTEST) -m combinations

test-fuzz: $(READY) ## more than ten thousand generated requests to a server
	VAEFLOW_FUZZ=12000 $(PYTEST) tests/serving/test_fuzz.py

test-load: $(READY) ## twice the load that a server can carry, for two minutes, and a report
	VAEFLOW_LOAD=120 pytest -s -m load

attack: $(READY) ## hostile clients of twenty kinds, and honest ones beside them, and a report
	pytest -m attack tests/serving/test_attack.py

test-install: $(READY) ## the wheel in empty environments of Python 3.11, 3.12 and 3.13, as are here
	pytest -m install

test-containers: $(READY) ## a project's containers, built and run: as root, with buildah, debootstrap
	pytest -m containers

# `make gpu DATA=FOLDER`, with MNIST's four files there. Elsewhere its tests are skipped.
DATA ?=
gpu: $(READY) ## measure on a GPU in eight minutes, then the tests for one
	@if nvidia-smi -L; then PYTHON=python benchmarks/gpu.sh $(if $(DATA),--data $(DATA),--tiny); \
	  else echo "no GPU: nvidia-smi shows none, and nothing is measured"; fi
	pytest -m gpu

test-all: test test-kills test-servers test-backends test-combinations test-fuzz test-load \
          test-install test-containers attack ## all of them

lint: $(READY) ## linter, formatter check, and strict types
	ruff check
	ruff format --check
	mypy
	cd benchmarks && mypy $(LENIENT) *.py contestants/*.py

# Of the benchmarks: whether what they call is there and takes what they give it.
LENIENT := --config-file= --ignore-missing-imports $(addprefix --disable-error-code=,arg-type \
           assignment attr-defined index misc operator return-value type-var union-attr var-annotated)

coverage: $(READY) ## the branches that `make test` runs, with a floor
	$(PYTEST) --cov --cov-report=term:skip-covered

docs: $(READY) ## the site, in site/; a warning is an error
	python -m typer vaeflow.cli utils docs --name vaeflow | sed '1s/.*/# Commands/' > docs/reference/cli.md
	zensical build --clean --strict

release: $(READY) ## build the wheel and the source archive in dist/
	rm -rf dist
	$(UV) build --quiet --no-build-isolation --python $(BIN)/python

COMPILE  := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
            --no-header --no-annotate --no-emit-index-url
TEMPLATE := src/vaeflow/project/template
lock: $(UV) ## resolve pyproject.toml anew into requirements.txt, and into the locks of projects
	$(COMPILE) --upgrade --extra pipeline --extra serve --extra grpc --extra dev --extra docs \
	  pyproject.toml --output-file requirements.txt
	echo 'pytest' | $(COMPILE) --constraint requirements.txt --extra pipeline --extra serve \
	  pyproject.toml - > $(TEMPLATE)/requirements.lock
	$(COMPILE) --constraint requirements.txt --extra serve --extra grpc \
	  pyproject.toml > $(TEMPLATE)/requirements-serve.lock

clean: ## remove the environment and everything a run has made, but not the data
	rm -rf .venv outputs mlflow.db mlflow.lock mlartifacts dvc_plots site dist

# An environment that was moved with its folder does not work: it is made anew.
ifneq ($(or $(shell cat .venv/.place 2>/dev/null),$(CURDIR)),$(CURDIR))
  $(shell rm -f .venv/.ready .venv/bin/uv)
endif

# Stamps, so that nothing is installed again until what is to be installed changes.
$(UV): requirements-uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Installing into .venv: it takes about 3.9 GB of disk, and a minute on a fast line."
	@$(PYTHON) -m venv --clear .venv
	@echo "$(CURDIR)" > .venv/.place
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  --requirement $<
	@touch $@

# uv would prefer another environment that happens to be active: say which one is meant.
$(READY): $(UV) requirements.txt pyproject.toml
	@echo "Installing the locked packages (TensorFlow is most of them) ..."
	@$(UV) pip sync --python $(BIN)/python --quiet --compile-bytecode --require-hashes \
	  requirements.txt
	@$(UV) pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "Installed."
