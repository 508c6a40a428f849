# make demo: a guided grid with the bundled models.  make test: every test that can run here.
# make pythons: the core tests on every supported Python that is here.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
HOST := $(or $(COMFYUI_PATH),$(HOME)/comfy/ComfyUI)

.PHONY: demo test pythons evaluate closed-form setup

demo: $(VENV)/.demo
	$(RUN) -m sdg_core demo --out demo.png

test: $(VENV)/.test
	$(RUN) tests/run.py

# Each Python in an environment of its own, .venv-3.10 and so on.
pythons:
	$(PYTHON) tests/pythons.py

evaluate: $(VENV)/.demo
	$(RUN) -m sdg_core evaluate

# One CPU build of torch and torchvision that fit each other; the package itself pins neither.
$(VENV)/.demo: pyproject.toml tests/constraints.txt
	[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint tests/constraints.txt --editable .
	touch $@

# With a ComfyUI at hand its requirements come along, so that the host tests run in this environment.
$(VENV)/.test: $(VENV)/.demo pyproject.toml tests/constraints.txt
	$(RUN) -m pip install --quiet --constraint tests/constraints.txt --editable ".[test]"
	[ ! -f "$(HOST)/requirements.txt" ] || $(RUN) -m pip install --quiet --constraint tests/constraints.txt --requirement "$(HOST)/requirements.txt"
	touch $@

# Guided samples of Gaussian data through every sampler of the host, beside unguided ones: a table.
closed-form: $(VENV)/.test
	$(RUN) -m pytest tests/host/test_gaussian.py -o python_functions="measure_*" -q -s
