# Everything sets itself up: each environment is made once, and again when pyproject.toml changes.
PYTHON ?= python3
CORE := .venv/core
FULL := .venv/full

.PHONY: demo test lint bench bench-quality docs dist clean

demo: $(CORE)/ready  ## Merge trained models with every method and show how good the results are.
	$(CORE)/bin/python -m demo.run

test: $(FULL)/ready  ## All the tests, warnings as errors.
	$(FULL)/bin/python -W error -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(FULL)/ready
	$(FULL)/bin/ruff check .
	$(FULL)/bin/ruff format --check .
	$(FULL)/bin/mypy

bench-quality: $(CORE)/ready  ## Which method keeps most of what experts learnt, in three regimes; see docs/quality.md.
	$(CORE)/bin/python -m benchmarks.quality

bench: $(FULL)/ready  ## The reference work beside a plain copy; see benchmarks/README.md for the options.
	$(FULL)/bin/python benchmarks/run.py

docs: $(FULL)/ready  ## The documentation as a site, in site/.
	NO_MKDOCS_2_WARNING=1 $(FULL)/bin/python -m mkdocs build --strict

dist: $(FULL)/ready  ## What a release consists of, in dist/.
	rm -rf dist
	$(FULL)/bin/python -m build --no-isolation
	$(FULL)/bin/python -m twine check --strict dist/*

$(CORE)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(CORE)
	$(CORE)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(FULL)/ready: pyproject.toml
	$(PYTHON) -m venv --clear $(FULL)
	$(FULL)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,bench,docs,release]'
	touch $@

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
