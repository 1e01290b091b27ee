# Everything runs in .venv, which is made on first use and again when the dependencies change.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
READY := .venv/.installed

.PHONY: demo test lint docs soak bench clean

demo: $(READY)
	@.venv/bin/aollm demo

test: $(READY)
	@.venv/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

docs: $(READY)
	@.venv/bin/mkdocs build --strict

soak: $(READY)
	@.venv/bin/python -m pytest -q -m soak --timeout=3600

bench: $(READY)
	@.venv/bin/python -m aollm.bench overlap demo --offload-cpu-layers 0

clean:  # .venv and .bench (model files) are kept: both cost minutes to make again
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find aollm tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "aollm needs Python 3.11 or newer, and '$(PYTHON)' is not that; name one: make PYTHON=python3.11" >&2; exit 1; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv || \
		{ echo "could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (once, some minutes)" >&2
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint,docs,plots,server,trio]' -c constraints.txt
	@touch $@
