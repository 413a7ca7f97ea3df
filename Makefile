# The two commands of the README: `make book` and `make test`. Each sets up what it needs in .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := book
.PHONY: setup export notebooks check test frameworks mutants book pages clean

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PY := $(BIN)/python
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
export OMP_NUM_THREADS ?= 1 # two workers of one thread each: the book's tensors are small
SAY = @printf '\n== %s\n'

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with make PYTHON=..."; exit 1; }
	$(SAY) "setup: .venv with $(PYTHON) and the packages of constraints.txt (minutes, once)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

export: setup
	$(SAY) "export: book/NAME.md -> agrlib/NAME.py"
	@$(PY) tools/export.py

notebooks: export
	$(SAY) "notebooks: execute the chapters whose pair is not fresh"
	@$(PY) tools/notebooks.py

pages:
	$(SAY) "book: build from the stored outputs, every warning an error"
	@$(PY) tools/notebooks.py --seed
	@$(BIN)/jupyter-book build . --all --warningiserror --keep-going --quiet

book: notebooks pages
	@echo; echo "The book: $(CURDIR)/_build/html/index.html"

check: setup
	$(SAY) "export: are the modules those of the chapters?"
	@$(PY) tools/export.py --check
	$(SAY) "notebooks: is every pair fresh?"
	@$(PY) tools/notebooks.py --check
	$(SAY) "ruff and mypy"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

test: check
	$(SAY) "pytest: library, tools, sources, doctests"
	@$(PY) -m pytest -q -m 'not pages and not browser' -n 2 --dist loadfile
	$(SAY) "nbval: execute every notebook and compare with the stored outputs"
	@$(PY) -m pytest -q --nbval --nbval-current-env --nbval-cell-timeout=600 \
		--nbval-sanitize-with=tests/sanitize.cfg -n 2 --dist loadfile book
	@$(MAKE) --no-print-directory pages
	$(SAY) "pytest: the built pages and the browser"
ifeq ($(CHROMIUM),)
	@echo "Chromium is not installed: the browser tests are left out."
	@$(PY) -m pytest -q -m pages
else
	@$(PY) -m pytest -q -m 'pages or browser'
endif

# The newest of each beside the book's torch; timm apart, as its torchvision must not stand beside
# transformers.
.venv-frameworks/ready: FRAMEWORKS := '.[cpu,frameworks]'
.venv-timm/ready: FRAMEWORKS := '.[cpu]' timm
.venv-frameworks/ready .venv-timm/ready: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it with make PYTHON=..."; exit 1; }
	$(SAY) "setup: $(@D) with $(PYTHON) and the newest frameworks (minutes, once)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		$$(grep '^torch==' constraints.txt) pytest -e $(FRAMEWORKS)
	@touch $@

frameworks: .venv-frameworks/ready .venv-timm/ready
	$(SAY) "pytest: Lightning, accelerate, transformers, peft"
	@.venv-frameworks/bin/python -m pytest -q --ignore tests/frameworks/test_timm.py tests/frameworks
	$(SAY) "pytest: timm"
	@.venv-timm/bin/python -m pytest -q tests/frameworks/test_timm.py

mutants: setup
	@$(PY) tools/mutants.py
	@$(PY) tools/claims.py

clean:
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
