# make setup | test | check | demo | gpu | wheel: six targets; each makes what it needs.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup test check demo gpu wheel
setup: $(READY)

# torch first: with it in place, nothing below pulls another build of it
$(READY): pyproject.toml constraints.txt CMakeLists.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "needs Python >= 3.11: make PYTHON=python3.12"; exit 3; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) triton -e ".[onnxruntime-gpu,tensorrt-rtx,netron,quality,profile,wandb,dev]"
	sh tools/install_browser.sh
	touch $(READY)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder # else files of few, long tests come last

check: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

demo: $(READY)
	$(BIN)/python tools/demo.py --out out/demo

gpu: $(READY)
	$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'skipped: needs a GPU')"
	$(BIN)/python -m pytest tests/test_gpu.py tests/interpreted_*.py
	-$(BIN)/python -m pytest tests/test_gluon_attention.py # where this fails the tuner refuses its configs
	$(BIN)/python tools/bench_kernels.py --tune --write-tables --family attention --family norms --family group-norms --family blocks --table
	$(BIN)/python tools/bench_models.py --seconds 1800

# for a release: the Triton kernels for six GPUs in it, compiled here without one; what was compiled before is kept
wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist . \
		--config-settings=build-dir=build/wheel --config-settings=cmake.define.OPTIMIZE_CUBINS=ON
