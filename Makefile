# make demo: a guided grid with the bundled models.  make test: every test that can run here.
# make pythons: the core tests on every supported Python that is here.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
HOST := $(or $(COMFYUI_PATH),$(HOME)/comfy/ComfyUI)

.PHONY: demo test matrix pythons evaluate closed-form precision gpu-check fuzz soak

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

# With a ComfyUI at hand its requirements come along, so that the host tests run in this environment; with npm, what checks
# the frontend's types.
$(VENV)/.test: $(VENV)/.demo pyproject.toml tests/constraints.txt package.json
	$(RUN) -m pip install --quiet --constraint tests/constraints.txt --editable ".[test]"
	[ ! -f "$(HOST)/requirements.txt" ] || $(RUN) -m pip install --quiet --constraint tests/constraints.txt --requirement "$(HOST)/requirements.txt"
	! command -v npm > /dev/null || npm install --silent --no-audit --no-fund || true
	touch $@

# Guided samples of Gaussian data through every sampler of the host, beside unguided ones: a table.
closed-form: $(VENV)/.test
	$(RUN) -m pytest tests/host/test_gaussian.py -o python_functions="measure_*" -q -s

# How far guided models in bf16, fp16 and fp8 are from float32: two tables.
precision: $(VENV)/.test
	$(RUN) -m pytest tests/host/test_precision.py -o python_functions="measure_*" -q -s

# What only a card can show. Says that it was skipped where there is none.
gpu-check: $(VENV)/.test
	$(RUN) benchmarks/gpu_check.py

# The tests with the kernels of other CPUs, and with one and two threads: a table. TESTS=tests/core for a part of them.
matrix: $(VENV)/.test
	$(RUN) tests/matrix.py $(TESTS)

# Mutated workflows, odd values and made-up graphs, posted to a real host: a table of what came of them.
fuzz: $(VENV)/.test
	$(RUN) -m pytest tests/host/test_fuzz.py -o python_functions="measure_*" -q -s

# 200 runs in one host, some of them cancelled, wrong or out of memory: a table of what the process holds.
soak: $(VENV)/.test
	$(RUN) -m pytest tests/host/test_soak.py -o python_functions="measure_*" -q -s
