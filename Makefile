# Every target is one command that CI runs too; `make check test-all` is what a commit needs.
# The tools come from the active environment; without one, from .venv.
.PHONY: check fix test test-all gpu docs

export PATH := $(if $(VIRTUAL_ENV),,$(CURDIR)/.venv/bin:)$(PATH)

check:            ## format, lint, types, import layers
	ruff format --check . && ruff check . && basedpyright && lint-imports

fix:              ## repair what can be repaired
	ruff check --fix . ; ruff format .

test:             ## the fast suite: unit, property, distributed (gloo)
	bash launch/test.sh -m "not slow and not gpu"

test-all:         ## the whole suite, as CI runs it
	bash launch/test.sh

gpu:              ## kernels against their eager references, on a GPU machine
	bash launch/test.sh -m gpu

docs:             ## the site in build/site, warnings are errors: pip install -e '.[docs]' first
	mkdocs build --strict --quiet
