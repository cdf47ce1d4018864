# The front door. `make run` and `make test` set themselves up; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Every shell script of ours, also before it is added to git.
SHELL_FILES = $$(git ls-files --cached --others --exclude-standard -- '*.sh' '*.bats' .ci/run)

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

.PHONY: run
run: ## install, then egs/mini from raw speech to a scored RESULTS.md (no GPU, no download of data)
	@tools/install.sh
	cd egs/mini/asr1
	./run.sh

.PHONY: test
test: ## install, then every test: shell, unit, and the recipe end to end
	@tools/install.sh --dev
	status=0
	bats tests/shell || status=1
	pytest -n 2 --dist loadgroup || status=1
	exit $$status

.PHONY: lint
lint: ## ruff, shellcheck and who may import whom
	@tools/install.sh --dev
	ruff check .
	ruff format --check .
	shellcheck --external-sources $(SHELL_FILES)
	lint-imports

.PHONY: types
types: ## mypy
	@tools/install.sh --dev
	mypy

.PHONY: install
install: ## only install (see tools/install.sh --help for a GPU and other options)
	@tools/install.sh

.PHONY: clean
clean: ## remove caches of tools; never data, experiments or .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
