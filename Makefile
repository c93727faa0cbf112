# Commands of this project. `make` alone lists them.

.DEFAULT_GOAL := help
.PHONY: help up down logs test lint bench lock schema prices wheel image \
	prove-usage prove-stats prove-journal prove-restart prove-image prove-terraform chaos
# A target whose recipe fails is not kept; the stamps below depend on it.
.DELETE_ON_ERROR:

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet
TESTS ?= tests

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## start a gateway on this machine, with an account, a key and a first stream
	@if docker compose ls > /dev/null 2>&1 && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; \
	then python3 -m gateway.local up; \
	else $(MAKE) --silent .venv/.run && $(BIN)/python -m gateway.local up; fi

down: ## stop it; its data is kept
	@$(NEEDS_PYTHON); $(PYTHON) -m gateway.local down

logs: ## follow what it writes (ID=…: all that it wrote about one request)
	@$(NEEDS_PYTHON); $(PYTHON) -m gateway.local logs $(if $(ID),'$(ID)')

test: lint ## everything: lint, types, layers, and all tests with coverage
	$(BIN)/pytest -n 2 --cov --cov-report=term --cov-fail-under=90 $(TESTS)

lint: .venv/.test ## style, types and the layers between modules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.run ## CPU, latency and memory beside nginx: 7 minutes (QUICK=1: 50 s; PEERS=1: other gateways too; SOAK=10: minutes)
	@$(NEEDS_NGINX)
	@$(BIN)/python -m tests.benchmarks.bench $(if $(QUICK),--quick) $(if $(PEERS),--peers) $(if $(SOAK),--soak $(SOAK))

prove-usage: .venv/.test ## kill -9 gateways under load 100 times, stop Postgres 5 times, and count what is lost
	@$(BIN)/python -m tests.prove.kill_loop

chaos: .venv/.test ## break everything, and print which promises held: 16 minutes (QUICK=1: 6; MINUTES=10: of the soak)
	@$(BIN)/python -m tests.prove.chaos $(if $(QUICK),--quick) $(if $(MINUTES),--minutes $(MINUTES))

prove-stats: .venv/.test ## ask every kind of question of ten million usage rows (minutes, and 10 GB of disk)
	@$(BIN)/python -m tests.prove.stats_at_scale

prove-journal: .venv/.test ## what the journal adds to a request, beside the disk's own fdatasync
	@$(BIN)/python -m tests.prove.journal_overhead

prove-restart: .venv/.test ## restart two gateways behind nginx under load, and count what is lost
	@$(BIN)/python -m tests.prove.rolling_restart

prove-image: .venv/.test ## build the image without Docker (Debian, root), run it read-only, and weigh it
	@$(BIN)/python -m tests.prove.image

prove-terraform: .venv/.test ## apply terraform/ to a stand-in for AWS, and see that a second plan is empty
	@$(BIN)/python -m tests.prove.terraform

wheel: .venv/.test ## build dist/: the wheel, and the bill of materials of what it is installed with
	@$(BIN)/python -m scripts.release

image: ## build the image ai-gateway with Docker
	@version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' gateway/__init__.py); \
	docker build --build-arg VERSION=$$version --build-arg REVISION=$$(git rev-parse HEAD) \
		--tag ai-gateway --tag ai-gateway:$$version .

schema: .venv/.test ## rewrite sql/schema.sql after a new migration
	@$(BIN)/python -m tests.support.stores

prices: .venv/.run ## rewrite gateway/prices.json, and what the dashboards know of it, from the newest genai-prices
	$(PIP) --target .venv/prices --upgrade genai-prices
	PYTHONPATH=.venv/prices:. $(BIN)/python scripts/make_prices.py
	$(BIN)/python -m scripts.dashboards

# --- the environment ----------------------------------------------------------------------------------------------

# The oldest Python that will do, by any of its names.
PYTHON = $(shell for name in $(BIN)/python python3 python3.11 python3.12 python3.13 python3.14; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$name && break; done)

NEEDS_PYTHON = test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed."; exit 1; }

# Root on a Debian may install what is missing; others are told.
APT = test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends ca-certificates $(1) > /dev/null

# The yardstick of the benchmark, and a load balancer of the tests. Debian starts what it installs; these have an nginx of their own.
NEEDS_NGINX = PATH="$$PATH:/usr/sbin" command -v nginx > /dev/null || { $(call APT,nginx-light) && \
	{ service nginx stop > /dev/null 2>&1 || true; }; } || { echo "nginx is needed: please install it."; exit 1; }

# Debian keeps the part of Python that makes environments in a package of its own.
.venv/bin/pip:
	@$(NEEDS_PYTHON)
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		$(call APT,python3-venv); \
	} || { echo "$(PYTHON) cannot make environments: install its venv package (Debian: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv --clear .venv

# Everything is installed by hash, what builds is too (hatchling, and setuptools for quantile-python, which has no wheel):
# without isolation pip takes it from the environment.
.venv/.run: requirements.lock requirements-build.lock pyproject.toml | .venv/bin/pip
	@echo "Installing the gateway's dependencies into .venv (half a minute, once)."
	$(PIP) --require-hashes -r requirements-build.lock
	$(PIP) --require-hashes --no-build-isolation -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# Node comes in a wheel; the npm SDK is installed by its own lock. curl is the one program taken from the machine.
.venv/.test: requirements-test.lock requirements-infra.lock tests/acceptance/node/package-lock.json .venv/.run
	@echo "Installing the tests' dependencies into .venv (two minutes, once)."
	$(PIP) --require-hashes -r requirements-test.lock
	@# In an environment of their own: checkov wants other versions of half of the rest.
	test -x .venv/infra/bin/python || $(BIN)/python -m venv .venv/infra
	.venv/infra/bin/python -m pip --disable-pip-version-check --no-input install --quiet --require-hashes -r requirements-infra.lock
	cd tests/acceptance/node && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --silent --no-audit --no-fund
	@command -v curl > /dev/null || { $(call APT,curl); } || { echo "curl is needed for the tests: please install it."; exit 1; }
	@($(NEEDS_NGINX)) || echo "Without it the tests of restarts behind it will be skipped."
	@$(NEEDS_CHROMIUM)
	@$(NEEDS_PROMETHEUS)
	@touch $@

# For the tests of the page and of the dashboards; where neither is to be had these are skipped, and say so.
NEEDS_CHROMIUM = command -v chromium > /dev/null || { $(call APT,chromium fonts-dejavu-core); } || \
	echo "No chromium: the tests of the page will be skipped."
# Unpacked, not installed: Debian would start it.
NEEDS_PROMETHEUS = command -v promtool > /dev/null || test -x .venv/prometheus/usr/bin/promtool || { \
	mkdir -p .venv/prometheus && cd .venv/prometheus && command -v apt-get > /dev/null && \
	{ test "$$(id -u)" != 0 || apt-get update -qq; } && apt-get download -qq prometheus && \
	dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb; } || \
	echo "No prometheus: the tests of the dashboards will be skipped."

lock: .venv/.run ## resolve the dependencies anew (UPGRADE=--upgrade takes newer ones)
	$(PIP) --target .venv/lock --upgrade uv
	$(LOCK) pyproject.toml --extra embedded -o requirements.lock
	$(LOCK) pyproject.toml --extra embedded --extra otel --extra test -c requirements.lock -o requirements-test.lock
	printf 'hatchling>=1.27\neditables\nsetuptools>=80\n' | $(LOCK) - -c requirements-test.lock -o requirements-build.lock
	printf 'checkov>=3.3\nmoto[server]>=5.2\n' | $(LOCK) - -o requirements-infra.lock

# For every platform, and without the name of the index they came from.
LOCK = .venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url $(UPGRADE)
