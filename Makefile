# Commands of a contributor. CONTRIBUTING.md explains them. `make help` lists them.
# They run in the active environment: `. .venv/bin/activate` first.

PYTHON ?= python
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile
SLOW = slow or distributed or packaging

.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-all test-newest docs site links

help:  ## List the commands.
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST)

install:  ## Install the package with the development tools, and the commit hooks in a clone.
	$(PYTHON) -m pip install -c constraints.txt -e '.[dev]'
	if [ -e .git ]; then $(PYTHON) -m pre_commit install; fi

format:  ## Format the code and sort the imports.
	ruff check --select I --fix .
	ruff format .

lint:  ## Check format, code and import layers.
	ruff format --check .
	ruff check .
	lint-imports

types:  ## Check the types.
	mypy

test:  ## Run the fast tests.
	$(PYTEST) -m "not ($(SLOW))"

test-all:  ## Run every test.
	$(PYTEST)

test-newest:  ## Run every test with the newest versions that setup.cfg allows, in a new environment.
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install -q -e '.[test]'
	$(MAKE) test-all PYTHON=.venv-newest/bin/python

docs:  ## Write docs/settings.md from the property files.
	$(PYTHON) -m recbole_gr2.config > docs/settings.md.tmp
	mv docs/settings.md.tmp docs/settings.md

site:  ## Build the documentation site in site/, and check it.
	$(PYTHON) docs/build_site.py

links:  ## Check the addresses in the documentation. Needs the network.
	$(PYTHON) docs/check_links.py
