# Each target works alone, in any order, in a fresh clone: it installs what it needs into $(VENV) first,
# once. For another interpreter or other versions of the dependencies:
#   make test VENV=.venv-3.13 PYTHON=python3.13 CONSTRAINTS=my-constraints.txt

VENV ?= .venv
CONSTRAINTS ?=
TEST_GROUPS ?= test integrations
PYTEST_ARGS ?=
CONFORMANCE_ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-durable test conformance lint types docs bench clean

bin := $(VENV)/bin
stamps := $(VENV)/.stamps
pip := $(bin)/python -m pip --disable-pip-version-check --quiet
checked := $(wildcard sqla_signals tests/typing)
# One process, no limit of time; the table at the end is ours, not pytest-benchmark's.
bench_options := -p no:xdist --timeout 0 --benchmark-quiet \
	-o python_files='bench_*.py' -o python_functions='bench_*'

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(stamps)/demo ## Run the example shop on SQLite
	@$(bin)/python -m examples.shop

demo-durable: $(stamps)/demo-durable ## Run the durable shop: a relay and a Celery worker, no server needed
	@$(bin)/python -m examples.durable_shop

# The tests start many processes, and each would compile the package.
test: export PYTHONDONTWRITEBYTECODE =
test: $(stamps)/test ## Run the whole suite: tests, documentation snippets, PostgreSQL included
	$(bin)/python -m pytest -n auto $(PYTEST_ARGS)

conformance: $(stamps)/test ## Run SQLAlchemy's own tests of the ORM with signals installed
	$(bin)/python -m tests.conformance.run $(CONFORMANCE_ARGS)

lint: $(stamps)/lint ## Check style and formatting with ruff
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(stamps)/types ## Check types with mypy --strict and pyright
	$(bin)/mypy $(checked)
	PATH="$(abspath $(bin)):$$PATH" pyright $(checked)
	PATH="$(abspath $(bin)):$$PATH" pyright --ignoreexternal --verifytypes sqla_signals

docs: $(stamps)/docs ## Build the documentation into docs/_build/html; a warning is an error
	$(bin)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(stamps)/bench ## Compare with hand-written listeners and others; writes docs/performance.md
	$(bin)/python -m pytest tests/perf $(bench_options) --write-docs $(PYTEST_ARGS)

clean: ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) .ci/venv build dist docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Installing --------------------------------------------------------------------------------------

# The first interpreter that is new enough and can make a virtual environment.
# `PYTHON=...` overrides the search, but not the check.
find_python = for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3.15 python3 python); do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		&& { echo "$$python"; break; }; done

$(stamps)/venv:
	@python="$$($(find_python))"; \
	if [ -z "$$python" ]; then \
		echo "make: no Python 3.11 or newer with venv and pip was found ($(or $(PYTHON),python3.11 to python3.15, python3, python))." >&2; \
		echo "make: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	@$(pip) install --upgrade 'pip>=25.1'
	@mkdir -p $(stamps) && touch $@

# install_groups: the package itself, editable, with the dependency groups named.
install_groups = $(pip) install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable . $(addprefix --group ,$(1))

$(stamps)/demo: $(stamps)/venv pyproject.toml
	@echo "Installing what the demo needs into $(VENV)"
	@$(call install_groups,demo)
	@touch $@

$(stamps)/demo-durable: $(stamps)/venv pyproject.toml
	@echo "Installing what the durable demo needs into $(VENV)"
	@$(call install_groups,demo-durable)
	@touch $@

$(stamps)/test: $(stamps)/venv pyproject.toml
	@echo "Installing what the tests need into $(VENV)"
	@$(call install_groups,$(TEST_GROUPS))
	@touch $@

$(stamps)/lint: $(stamps)/venv pyproject.toml
	@echo "Installing ruff into $(VENV)"
	@$(pip) install --group lint
	@touch $@

$(stamps)/types: $(stamps)/venv pyproject.toml
	@echo "Installing what the type checks need into $(VENV)"
	@$(call install_groups,types)
	@touch $@

$(stamps)/bench: $(stamps)/venv pyproject.toml
	@echo "Installing what the benchmarks compare with into $(VENV)"
	@$(call install_groups,bench)
	@touch $@

$(stamps)/docs: $(stamps)/venv pyproject.toml
	@echo "Installing what the documentation needs into $(VENV)"
	@$(call install_groups,docs)
	@touch $@
