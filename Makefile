# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
INSTALLER ?= uv
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP = $(BIN)/python -m pip install --disable-pip-version-check
PACKAGE := -e '.[encoder,search,arrow,otel,train,bench,dev]' -c constraints.txt
CLAIM ?=
FAULTS ?=
FUZZ ?=
SOAK ?=
K8S ?=
TOOLS := $(CURDIR)/.tools/bin
SOURCES := hashlens encoder_service search_service protos deploy tests

.DEFAULT_GOAL := help
.PHONY: help setup demo claim test faults fuzz soak images-check k8s-check ghz kustomize check format \
  proto clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install everything (INSTALLER=pip to do without uv)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Hashlens needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(INSTALLER),uv)
	$(PIP) uv -c constraints.txt
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --compile-bytecode $(PACKAGE) || $(PIP) $(PACKAGE)
else
	$(PIP) $(PACKAGE)
endif
	@touch $@

demo: $(STAMP) ## Index and search the bundled images through both services
	$(BIN)/hashlens demo

claim: $(STAMP) ## Measure the paper's claim: 2.5M rows, 32 GB free on disk, half an hour (CLAIM='--rows ...')
	$(BIN)/hashlens bench claim $(CLAIM)

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

faults: $(STAMP) ## Crash the store at every named place, hundreds of times (FAULTS='--seed N')
	$(BIN)/python -m tests.faults.campaign $(FAULTS)
	$(BIN)/python -m tests.faults.chaos --minutes 3
	STATEFUL_EXAMPLES=100 $(BIN)/python -m pytest -q --timeout 1800 --hypothesis-profile random \
	  tests/unit/storage/test_stateful.py

soak: $(STAMP) ## Mixed traffic for 20 minutes: does anything drift? (SOAK='--minutes N')
	$(BIN)/python -m tests.soak.run $(SOAK)

fuzz: $(STAMP) ## Spoiled images, and noise on every port, for twenty minutes (FUZZ='--seed N')
	$(BIN)/python -m tests.fuzz.images $(FUZZ)
	$(BIN)/python -m tests.fuzz.wire $(FUZZ)

images-check: $(STAMP) ## Do what the images of deploy/docker do, without a container engine
	$(BIN)/python -m tests.deploy.images

k8s-check: $(STAMP) $(if $(shell command -v go),kustomize) ## Apply deploy/k8s to a real API server, built with Go and etcd (K8S='--keep')
	$(BIN)/python -m tests.deploy.apiserver $(K8S)

ghz: $(TOOLS)/ghz ## Install ghz, the load generator of deploy/ghz, with Go
kustomize: $(TOOLS)/kustomize ## Install kustomize, which renders deploy/k8s, with Go

$(TOOLS)/ghz:
	GOBIN=$(TOOLS) go install github.com/bojand/ghz/cmd/ghz@v0.120.0

$(TOOLS)/kustomize:
	GOBIN=$(TOOLS) go install sigs.k8s.io/kustomize/kustomize/v5@v5.7.1

check: $(STAMP) ## Format, lint, types, import contracts, protos, generated code
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

proto: $(STAMP) ## Regenerate hashlens/v1 from protos/
	$(BIN)/python protos/generate.py

clean: ## Remove .venv and build
	rm -rf $(VENV) build
