# Everything a person or CI runs. `make up` and `make test` need nothing installed before.
.DEFAULT_GOAL := help
.PHONY: help up test test-one-process test-go test-vllm vllm check generate docs lock bench bench-guard bench-telemetry bench-capacity bench-engine bench-identity bench-revocations bench-exports bench-analytics bench-cli bench-dashboards soak money money-switches sbom

PYTHON := .venv/bin/python
BIN := .venv/bin
# The contracts that a change must stay compatible with: the main branch as it was published.
CONTRACT_BASE ?= $(shell git rev-parse -q --verify origin/main || git rev-parse HEAD)
# Tests start servers from processes that use gRPC, whose own handling of forks may crash such a child before it runs.
export GRPC_ENABLE_FORK_SUPPORT := 0
CODE := mesh identity router analytics edge gateway deploy cli sdk/python tests

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

up: ## Start the whole platform here, prove that it answers, stop it with Ctrl-C (PORT=8080, ENGINE=llamacpp|vllm)
	@deploy/local/bootstrap.sh up
	@exec $(PYTHON) -m deploy.local

test: ## Unit, contract, integration and end-to-end tests against real servers
	@deploy/local/bootstrap.sh test
	$(BIN)/pytest -n 3 --dist loadgroup tests

test-one-process: ## The end-to-end tests with the edge and the router in one process
	@deploy/local/bootstrap.sh test
	ONE_PROCESS=1 $(BIN)/pytest tests/e2e

test-go: ## Go stubs and their example (Go 1.19 and its gRPC from Debian, 95 MB)
	@deploy/local/bootstrap.sh go
	SDK_GO=1 $(BIN)/pytest tests/e2e/test_sdk_go.py

vllm:
	@deploy/local/bootstrap.sh vllm

test-vllm: vllm ## The end-to-end tests against two real vLLM replicas
	ENGINE=vllm $(BIN)/pytest tests/e2e

check: ## Formatting, lint, types, import walls, contracts, generated files, documentation
	@deploy/local/bootstrap.sh test
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --exit-code >/dev/null
	proto/generate.sh --check
	$(BIN)/buf breaking --against '.git#ref=$(CONTRACT_BASE)'
	$(BIN)/mkdocs build --strict --site-dir .venv/site

bench: ## Measure ours beside other gateways (ROUNDS=5, TARGETS=aiaas,nginx, TESTS=unary,s200); see docs/benchmark.md
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.bench

bench-guard: ## Compare with the parent commit, or BASE=ref; fails if anything costs 1.15 times as much
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.guard

bench-telemetry: ## What metrics, traces and access log cost (ROUNDS=6, TESTS=unary,s200, TARGETS=aiaas); fails above 5 %
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.telemetry

bench-capacity: ## What each part costs by load, and two loads foretold from that (ROUNDS=2); fails above 20 % off
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.capacity

bench-engine: ## What we add to real vLLM (AIAAS_VLLM_PYTHON=... where it is installed elsewhere)
	@deploy/local/bootstrap.sh vllm
	@$(PYTHON) -m tests.load.engine

bench-cli: ## How long `aiaas --help` takes (RUNS=20); fails above 300 ms
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.command_line

bench-dashboards: ## Every panel of every dashboard under a mixed load, as a table and as pictures (DURATION_S=300)
	@deploy/local/bootstrap.sh test
	@$(PYTHON) -m tests.load.dashboards

soak: ## 1,000 streams for ten minutes (DURATION_S=600), slow readers among them, then a router that is killed
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.soak

bench-identity: ## identity with 20,000 organizations, 200,000 people and 500,000 keys
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.identity

bench-revocations: ## How long two routers still let revoked keys in, and let them stream (TRIALS=200)
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.revocations

bench-exports: ## A month of one organization as CSV and Parquet (ROWS=1000000)
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.exports

bench-analytics: ## What counting an event costs beside COPY (EVENTS=100000), 3,000/s and a burst (DURATION_S=600), questions and an export over 13 months (ROWS=5000000)
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.load.ingestion
	@$(PYTHON) -m tests.load.analytics
	@$(PYTHON) -m tests.load.analytics load

money: ## Kill every part while money moves, then hold all books against each other (LINES=router,redis, LONG=1, SEED=7)
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.money

money-switches: ## Take one protection away after the other, which `make money` must notice (WITHOUT=journal,fence)
	@deploy/local/bootstrap.sh up
	@$(PYTHON) -m tests.money switches

generate: ## Make gen/ from proto/, and docs/reference and dashboards from that and the code
	@deploy/local/bootstrap.sh test
	proto/generate.sh

docs: ## Build the documentation into site/; a broken link fails
	@deploy/local/bootstrap.sh test
	$(BIN)/mkdocs build --strict

sbom: ## Write what the image is made of into sbom.cdx.json (CycloneDX)
	@deploy/local/bootstrap.sh test
	@$(PYTHON) -m deploy.sbom deploy/locks/runtime.lock > sbom.cdx.json

lock: ## Pin every dependency with its hashes
	deploy/locks/lock.sh
