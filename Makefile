# make quickstart   install, then pretrain a small language model on this machine
# make test         install, then run the tests: all of them, but of a matrix of layouts only a part
# make test-all     the same with every cell
# make check        style, types and floors, then the tests, whose coverage is measured and has a floor

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COVERAGE := 85
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadscope

# The newest Python that is tested comes first. Each is asked, because a name alone may be a version manager's empty promise.
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

define FIND_PYTHON
for python in $(PYTHONS); do \
  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
done; \
if [ -z "$$found" ]; then \
  echo "ZeroFleet needs Python 3.11 or newer; tried: $(PYTHONS). Install one (Debian: apt-get install python3.11-venv)," \
    "or name one: make install PYTHON=/path/to/python" >&2; exit 2; \
fi; \
if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
  version=$$($$found -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
  echo "$$found cannot make a virtual environment; on Debian: apt-get install python$$version-venv" >&2; exit 2; \
fi
endef

.PHONY: install quickstart test test-all coverage check lint clean help

help:
	@sed -n 's/^# make /make /p' Makefile

install: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml
	@$(BIN)/python -c 'import pip' 2>/dev/null || { $(FIND_PYTHON); echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip==26.3
# DeepSpeed comes as source. Without its compiled operations the build needs no torch of its own; DeepSpeed compiles
# those that a run asks for, when it asks.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: install
	$(BIN)/zerofleet run quickstart

test: install
	$(PYTEST)

# Apart from `make test`: Python 3.11 takes up to twice the time for code whose lines are counted.
coverage: install
	$(PYTEST) --cov --cov-report=term --cov-fail-under=$(COVERAGE)

test-all: install
	$(PYTEST) --exhaustive

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports --no-logo

check: lint coverage

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage* build dist *.egg-info
	find launcher cluster tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
