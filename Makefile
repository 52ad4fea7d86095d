# `make` lists the targets. Each sets up what it needs; nothing but Python >= 3.11 has to be there.
.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := bash

BIN := .venv/bin
# Tests wait for servers half of the time: three workers keep two cores busy (docs/adr/0031).
WORKERS ?= 3
PARALLEL := -n $(WORKERS) --dist loadfile
PYTHON_DIRS := rnn_engine service timernn tests benchmarks examples

# One BLAS thread: results repeat bit for bit, and two cores are not fought over.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1
export GRPC_ENABLE_FORK_SUPPORT ?= 0
export PYTHONFAULTHANDLER ?= 1

.PHONY: help
help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Make .venv with the locked dependencies (quick when nothing changed).
	@scripts/setup.sh dev

.PHONY: torch
torch: setup
	@scripts/torch.sh

.PHONY: demo
demo: setup ## Train a language model through a server, kill the server, go on, sample. About two minutes.
	@$(BIN)/python -m examples.charlm

.PHONY: demo-weather
demo-weather: setup ## Forecast a real weather series, trained online. Under a minute.
	@$(BIN)/python -m examples.weather

.PHONY: test
test: lint unit ## Everything that must hold: lint, then all tests. PYTEST_ARGS is passed on.

.PHONY: unit
unit: torch
	@$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

.PHONY: test-newest
test-newest: setup ## The tests with the newest versions that pyproject.toml admits, and beside another gRPC client.
	@scripts/test_newest.sh $(PARALLEL) $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## ruff, mypy, the Lua scripts, import-linter, buf lint, stubs and tables as generated.
	@scripts/lint.sh

.PHONY: format
format: setup ## Let ruff format and fix what it can.
	@$(BIN)/ruff check --quiet --fix-only $(wildcard $(PYTHON_DIRS))
	@$(BIN)/ruff format --quiet $(wildcard $(PYTHON_DIRS))

.PHONY: proto
proto: setup ## Generate timernn/v1 from proto/.
	@scripts/proto.sh .

.PHONY: release-proto
release-proto: setup ## Record the contract that `buf breaking` holds later changes to.
	@$(BIN)/buf build --exclude-source-info --path proto/timernn -o proto/released.binpb

.PHONY: release-wheel
release-wheel: setup ## Build the release's wheel, the same bits each time, for the upgrade tests.
	@scripts/release_wheel.sh

.PHONY: lock
lock: setup ## Resolve requirements/*.lock anew; LOCK_ARGS=--upgrade takes the newest versions.
	@scripts/lock.sh $(LOCK_ARGS)

.PHONY: bench-engine
bench-engine: torch ## Measure the engine against torch.nn.RNN.
	@scripts/setup.sh bench
	@$(BIN)/python -m benchmarks.engine

.PHONY: bench
bench: torch ## Measure the service against its peers.
	@scripts/setup.sh bench
	@$(BIN)/python -m benchmarks

.PHONY: faults
faults: setup ## Break the service on purpose, minutes.
	@$(BIN)/python -m pytest tests/faults -m "not long and not soak" $(PYTEST_ARGS)

.PHONY: faults-long
faults-long: setup ## The same at length, up to hours.
	@$(BIN)/python -m pytest tests/faults -m "not soak" --timeout=7200 $(PYTEST_ARGS)

.PHONY: faults-docs
faults-docs: setup ## Put what the last whole `make faults` found into docs/reliability.md.
	@$(BIN)/python tests/faults/instruments/page.py

.PHONY: operations-docs
operations-docs: setup ## Write the tables of docs/operations.md: settings, limits, metrics.
	@$(BIN)/python -m tests.support.operations_page

.PHONY: soak
soak: setup ## Hours of mixed load, watched for leaks.
	@$(BIN)/python -m pytest tests/faults -m soak --timeout=0 $(PYTEST_ARGS)

.PHONY: security
security: setup ## Fuzz the service, 100,000 calls in process and 5,000 over the wire, and abuse its port: minutes.
	@scripts/security.sh $(PYTEST_ARGS)

.PHONY: image-test
image-test: ## Build the image, start it, send it a Forward, stop it (docker, podman or buildah).
	@scripts/image_test.sh

.PHONY: compose-test
compose-test: setup ## Run the compose files and break them; COMPOSE is the command, "docker compose" by default.
	@scripts/setup.sh operate
	@$(BIN)/python -m pytest tests/deployment/compose_run.py -p no:randomly $(PYTEST_ARGS)

.PHONY: operate
operate: setup ## Check the deployment's files with their own tools, and the page in Chromium.
	@scripts/operate.sh $(PYTEST_ARGS)

.PHONY: clean
clean: ## Remove what the targets made.
	rm -rf .venv .venv-newest .venv-beside .venv-mlserver build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
