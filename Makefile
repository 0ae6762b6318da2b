# `make check` answers within 90 seconds once built, `make test` within minutes; `make demo` shows what it is
# for. All set up .venv first; nothing else is needed but Python 3.10+ with venv and a C++ compiler.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
FORMATTED := $(shell find csrc tests examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(filter csrc/%,$(FORMATTED)) setup.py pyproject.toml
PYTEST := $(PY) -m pytest -n 2

.PHONY: demo data examples check test test-long test-all sanitize wheel docs recipes browser release bench readme lint \
  format ptxas gpu-check clean

demo: $(VENV)/built
	$(PY) -m examples.demo

# Fashion-MNIST of Debian's package, where apt is there; without it the examples take scikit-learn's digits.
data:
	@if [ -d /usr/share/datasets/fashion-mnist ]; then echo "Fashion-MNIST is in /usr/share/datasets"; \
	elif command -v apt-get >/dev/null; then \
	  run=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$run apt-get update -q && $$run apt-get install -y --no-install-recommends dataset-fashion-mnist; \
	else echo "make data: no apt-get here; the examples take scikit-learn's digits instead"; exit 1; fi

# A training for image retrieval; see examples/README.md. For instance: make examples OPTIONS="--loss circle"
examples: $(VENV)/built
	$(PY) -m examples.train_retrieval $(OPTIONS)

# Format, lint, and of every loss, engine and adapter a few tests.
check: lint $(VENV)/built
	$(PYTEST) --dist worksteal -m check

# After the tests of `make check`, the others with the cases that show every value of their parameters; but for
# those of `make test-long`.
test: check
	$(PYTEST) --dist loadfile --no-loadscope-reorder --brief -m "not check and not long and not release"

# What compiles (the CUDA sources for the emulator and with nvcc, custom losses), trains, or waits, for minutes.
test-long: $(VENV)/built
	$(PYTEST) --dist loadfile --no-loadscope-reorder --brief -m "long and not check and not release"

# Every case of all of these: values in all combinations, all sanitizers, every architecture of every kernel.
test-all: check
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not check and not release"

# The CUDA engine's tests on the emulator, with kernels under AddressSanitizer. Not those that build programs of
# their own.
sanitize: $(VENV)/built
	DML_EMULATOR_SANITIZER=address ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(PYTEST) --dist worksteal --brief \
	  $(patsubst %,tests/emulator/test_%_emulated.py,cuda matrix learned_params ring triplets ranking) \
	  -k "not planted and not sanitizers and not race and not stand_alone and not every_block_of"

# What a release has besides the package, and its tests; about ten minutes on two free cores.
release: wheel docs recipes browser
	$(PY) -m pytest -m release tests/release
	$(PY) -m tools.import_time

# For the torch in .venv: dist/dml_cuda-VERSION+torchX.YKERNELS-*.whl, and the sdist.
wheel: $(VENV)/ready
	$(PY) -m tools.wheel

# The site in build/site. A warning, such as a broken link, is an error.
docs: $(VENV)/built $(VENV)/docs
	rm -rf build/site
	$(PY) -m sphinx -c docs/site -E -d build/site-cache -W --keep-going -q . build/site
	@echo "build/site/index.html"

# The packages that examples/recipes train with.
recipes: $(VENV)/recipes $(VENV)/timm

# PyPI's torchvision, which timm imports, does not load beside a CPU build of torch, and other packages import a
# torchvision that they find: the two are kept beside.
$(VENV)/timm: $(VENV)/recipes
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ timm torchvision==0.28.0

# The Chromium that tests of the site use, where apt is there.
browser:
	@if ! command -v chromium >/dev/null; then \
	  run=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$run apt-get update -q && $$run apt-get install -q -y --no-install-recommends chromium fonts-dejavu-core; \
	fi

# Half an hour on two cores; `readme` then writes the table of the README from its JSON.
bench: $(VENV)/built
	$(PY) -m benchmarks --out benchmarks/results

readme: $(VENV)/built
	$(PY) -m benchmarks.readme

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

# Registers, spills, occupancy, code size and tensor-core instructions of every CUDA kernel; needs nvcc, no GPU.
ptxas: $(VENV)/ready
	$(PY) -m tools.machine_code

# Builds, tests, sanitises and benchmarks on the GPU of this machine, with a Python whose torch sees it. For a
# quarter of an hour: make gpu-check MINUTES=15. Some parts only: make gpu-check PARTS="driver tests".
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tools.gpu_check $(PARTS) $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf $(VENV) build dist out *.egg-info dml_cuda/*.so

$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(PY) -m compileall -q -j 0 -x '/tests?/|testing/_internal/' $(VENV)/lib >/dev/null || true  # as pip does, but on one core
	touch $@

$(VENV)/docs $(VENV)/recipes: $(VENV)/%: requirements-%.txt $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -r $<
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(PY) -c "import dml_cuda; print(dml_cuda.build_info())"
	touch $@
