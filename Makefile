# `make demo` and `make test` set everything up on a fresh machine with Python 3.11, pip and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-quick demo-full test wheel lint types docs install clean

demo: $(INSTALLED)
	$(BIN)/stethoscope demo

demo-quick demo-full: $(INSTALLED)
	$(BIN)/stethoscope demo --$(@:demo-%=%)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The wheel as a user installs it, without extras, in an environment of its own.
wheel: $(INSTALLED)
	rm -rf build
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir build .
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt build/*.whl
	STETHOSCOPE=$(CURDIR)/build/venv/bin/stethoscope $(BIN)/python -m pytest tests/test_keep.py -k installed_wheel

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(INSTALLED)

# torch comes with its own dependencies, which differ between builds; all else is exactly what constraints.txt lists.
$(INSTALLED): constraints.txt pyproject.toml demo/pyproject.toml demo/constraints-generate.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch setuptools
	$(PIP) install --quiet --no-deps --requirement constraints.txt
	@$(PIP) install --quiet --no-deps --requirement demo/constraints-generate.txt \
		|| echo "no C compiler: the generators of the demo's items are not installed and their tests are skipped"
	$(PIP) install --quiet --no-deps --no-build-isolation --editable . --editable demo
	touch $@

clean:
	rm -rf $(VENV) runs site
