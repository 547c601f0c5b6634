# make demo   train a small GPT on real text, stock and patched, side by side
# make test   all tests, on every backend that this machine can run; JOBS=2: in two processes
# make bench  measure the ops against torch
# Each works by itself on a fresh clone: Python, make and a C++ compiler are enough.
PYTHON ?= python3
JOBS ?= 1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') \
           csrc/CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench lint format clean

demo: $(VENV)/built
	$(BIN)/python -m pyfast demo $(ARGS)

test: $(VENV)/built
	for kind in "" --emulate-cuda; do \
	    seq 0 $$(($(JOBS) - 1)) | $(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=1) xargs -P $(JOBS) -I{} \
	    $(BIN)/python -m pytest --part {}/$(JOBS) $$kind $(ARGS) || exit 1; done

bench: $(VENV)/built
	$(BIN)/python -m pyfast bench $(ARGS)

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	rm -rf build/mypy && mkdir -p build/mypy && cp -r pyfast build/mypy/
	cp -r kernels build/mypy/pyfast/kernels && cp -r benchmarks build/mypy/pyfast/benchmarks
	cd build/mypy && ../../$(BIN)/mypy --config-file ../../pyproject.toml pyfast

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The environment, with the build requirements in it: the module is then built without isolation,
# and what CMake has compiled before is kept.
$(VENV)/installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    setuptools pybind11 cmake ninja torch numpy triton rich matplotlib pytest pytest-benchmark \
	    hypothesis expecttest build ruff mypy clang-format \
	    accelerate diffusers lightning peft safetensors transformers x-transformers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	    --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyfast/_C.*.so
