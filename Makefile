# The Python that creates .venv, the app that `make serve` starts, and arguments for pytest.
PYTHON ?= python3
CONFIG ?= deploy/local.yaml
ARGS ?=

BIN := .venv/bin
CSRC := workers/kernels/csrc/*.h workers/kernels/csrc/*.cpp

# $(call phase,name,command): run the command, print its name and its time.
define phase
@start=$$(date +%s); echo "[$(1)] $(2)"; \
$(2) && echo "[$(1)] ok, $$(($$(date +%s) - start)) s" || \
{ code=$$?; echo "[$(1)] failed after $$(($$(date +%s) - start)) s"; exit $$code; }
endef

.PHONY: help install serve lint fix test test-fast test-clients test-kernels test-npu \
  test-ascend dashboards docs hashes \
  supply

help:
	@echo "XY-Serve: large language models served from a Ray cluster."
	@echo
	@echo "  make serve       install, fetch the default model, serve it, show one answer"
	@echo "                     CONFIG=deploy/cuda.yaml   another app; Ctrl-C ends it"
	@echo "  make test        install, lint, run all tests"
	@echo "                     ARGS='-k placement'       only some tests"
	@echo "  make test-fast   run the tests that need no engine and no Ray: under 90 s on two cores"
	@echo "  make test-clients"
	@echo "                   let clients of the ecosystem work with a server; 3 GB of environments"
	@echo "                     ARGS='--only langchain'   only some; ARGS=--help tells more"
	@echo "  make test-kernels"
	@echo "                   check the Triton kernels without a GPU or an NPU: under 10 minutes"
	@echo "  make test-npu    serve with two emulated NPUs and compare answers: under 4 minutes"
	@echo "  make test-ascend check our vLLM platform for NPUs, without one: under 1 minute"
	@echo "  make lint        check with ruff, clang-format and mypy --strict"
	@echo "  make fix         fix what ruff and clang-format can fix"
	@echo "  make dashboards  regenerate deploy/grafana/*.json and deploy/alerts.yml"
	@echo "  make docs        regenerate the config reference and the table of routes in the READMEs"
	@echo "  make hashes      renew the hashes of the pins in deploy/constraints.txt and supply.txt"
	@echo "  make supply      write an SBOM and the licences to build/supply, ask for vulnerabilities"
	@echo "  make install     create or update .venv"
	@echo "                     PYTHON=python3.12         another Python, 3.11 to 3.14"
	@echo
	@echo "The first 'make serve' takes several minutes, nearly all for downloads. The command line is"
	@echo ".venv/bin/xyserve (try .venv/bin/xyserve --help). 'rm -rf .venv' removes the installation."

install:
	@$(PYTHON) deploy/install.py

# exec: no shell that could end before xyserve receives Ctrl-C.
# An emulated NPU needs the NPU's compiler, which is in an environment of its own.
ifneq (,$(findstring npu-emulated,$(CONFIG)))
serve: install .venv-ascend/installed
	@exec .venv-ascend/bin/python -m cluster.cli.main up $(CONFIG)
else
serve: install
	@exec $(BIN)/xyserve up $(CONFIG)
endif

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

test-clients: install
	@$(BIN)/python -m tests.clients.run $(ARGS)

# Triton for GPUs and the one for NPUs are the same folder of site-packages: each has an environment,
# which takes all else from .venv. Needs gcc and objcopy.
TRITON = XYSERVE_TRITON=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 TRITON_CACHE_DIR=$$(mktemp -d)
TRITON_PYTEST = -m pytest -q -c tests/triton/pytest.ini $(ARGS)

# Two workers whose NPUs are emulated on this CPU answer over HTTP.
test-npu: install .venv-ascend/installed
	$(call phase,npu,$(TRITON) .venv-ascend/bin/python $(TRITON_PYTEST) tests/npu \
	  tests/workers/plugin/test_vllm_seams.py)

# Our platform for NPUs in vLLM, on the real torch_npu with empty libraries in place of CANN's.
test-ascend: install .venv-npu/installed
	$(call phase,ascend,LD_LIBRARY_PATH=.venv-npu/stubs TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(TRITON) \
	  .venv-npu/bin/python $(TRITON_PYTEST) tests/npu/test_platform.py \
	  tests/workers/plugin/test_vllm_seams.py)

test-kernels: install .venv-triton/installed .venv-ascend/installed
	$(call phase,interpreter,TRITON_INTERPRET=1 $(TRITON) .venv-triton/bin/python $(TRITON_PYTEST) \
	  tests/triton/test_interpreter.py)
	$(call phase,benchmark,TRITON_INTERPRET=1 $(TRITON) .venv-triton/bin/python \
	  -m tests.bench.gpu --interpret)
	$(call phase,cuda,$(TRITON) .venv-triton/bin/python $(TRITON_PYTEST) tests/triton/test_cuda.py)
	$(call phase,ascend,$(TRITON) .venv-ascend/bin/python $(TRITON_PYTEST) tests/triton/test_ascend.py)

# torch_npu beside what .venv-ascend has; it keeps torch from being imported anywhere else.
.venv-npu/installed: tests/triton/torch_npu.txt tests/npu/stubs.py .venv-ascend/installed
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --no-input --no-deps --require-hashes \
	  --only-binary=:all: --disable-pip-version-check --requirement $<
	@ascend=$$(.venv-ascend/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "import site; site.addsitedir('$$ascend')" > $$own/base.pth
	@$(@D)/bin/python tests/npu/stubs.py $(@D)/stubs
	@touch $@

.venv-triton/installed: tests/triton/cuda.txt
.venv-ascend/installed: tests/triton/ascend.txt
.venv-triton/installed .venv-ascend/installed:
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet --no-input --no-deps --require-hashes \
	  --only-binary=:all: --disable-pip-version-check --requirement $<
	@$(BIN)/python -c 'import sysconfig; \
	  print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@touch $@

# A test compares the files in git with cluster/observe/dashboards.
dashboards: install
	@$(BIN)/python -m cluster.observe.dashboards.grafana

# Tests compare what is in git with the config's dataclasses and with the table of routes.
docs: install
	@$(BIN)/python -m cluster.config.reference

hashes: .venv-supply/installed
	@.venv-supply/bin/python deploy/supply.py hashes

# The exit status is 1 for a known vulnerability, and 3 for packages about which nothing is known.
supply: install .venv-supply/installed
	@.venv-supply/bin/python deploy/supply.py

# Tools stay out of .venv, which they look at.
.venv-supply/installed: deploy/supply.txt
	@$(PYTHON) -m venv --clear .venv-supply
	@.venv-supply/bin/python -m pip install --quiet --no-input --no-deps --require-hashes \
	  --only-binary=:all: --disable-pip-version-check --requirement deploy/supply.txt
	@touch $@
