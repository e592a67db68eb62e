# The two commands of the README are `make serve` and `make test`. Both make the same environment first.
PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip install --disable-pip-version-check

.PHONY: serve test lint clean

serve: $(VENV)/.installed
	@$(VENV)/bin/triptych serve $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Triptych needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info
