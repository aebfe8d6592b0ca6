# Python that makes .venv, the app that `make serve` starts, and what `make test` gives to pytest.
PYTHON ?= python3
CONFIG ?= deploy/local.yaml
ARGS ?=

BIN := .venv/bin
CSRC := workers/kernels/csrc/*.h workers/kernels/csrc/*.cpp

# $(call phase,name,command): run the command and say its name and the time it took.
define phase
@start=$$(date +%s); echo "[$(1)] $(2)"; \
$(2) && echo "[$(1)] ok, $$(($$(date +%s) - start)) s" || \
{ code=$$?; echo "[$(1)] failed after $$(($$(date +%s) - start)) s"; exit $$code; }
endef

.PHONY: help install serve lint fix test test-fast dashboards docs

help:
	@echo "XY-Serve: large language models served from a Ray cluster."
	@echo
	@echo "  make serve      install, fetch the default model, serve it, show one answer"
	@echo "                    CONFIG=deploy/cuda.yaml   another app; Ctrl-C ends it"
	@echo "  make test       install, then ruff, mypy --strict and the whole test suite"
	@echo "                    ARGS='-k placement'       only some of the tests"
	@echo "  make test-fast  only the tests without engine and Ray: under 90 s on two cores"
	@echo "  make lint       ruff, clang-format and mypy --strict only"
	@echo "  make fix        let ruff and clang-format change what they can"
	@echo "  make dashboards write deploy/grafana/*.json and deploy/alerts.yml again, after a change of them"
	@echo "  make docs       write the config reference in deploy/README.md again, after a change of the config"
	@echo "  make install    only make .venv; the second time it has nothing to do"
	@echo "                    PYTHON=python3.12         another Python, 3.11 or newer"
	@echo
	@echo "The first 'make serve' takes some minutes, nearly all of it downloads. Then .venv/bin/xyserve"
	@echo "is the command line (try: .venv/bin/xyserve --help). 'rm -rf .venv' undoes the install."

install:
	@$(PYTHON) deploy/install.py

# exec: Ctrl-C reaches xyserve itself, with no shell between that could end first.
serve: install
	@exec $(BIN)/xyserve up $(CONFIG)

lint: install
	$(call phase,ruff,$(BIN)/ruff check . && $(BIN)/ruff format --check .)
	$(call phase,clang-format,$(BIN)/clang-format --dry-run --Werror $(CSRC))
	$(call phase,mypy,$(BIN)/mypy)

fix: install
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/clang-format -i $(CSRC)

test: lint
	$(call phase,pytest,$(BIN)/pytest $(ARGS))

test-fast: install
	$(call phase,pytest,$(BIN)/pytest --fast $(ARGS))

# What is in git; a test compares it with cluster/observe/dashboards.
dashboards: install
	@$(BIN)/python -m cluster.observe.dashboards.grafana

# The config reference; a test compares it with the config's dataclasses.
docs: install
	@$(BIN)/python -m cluster.config.reference
