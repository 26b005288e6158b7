# SPDX-License-Identifier: Apache-2.0
# `make test` and `make bench` set up what they need in .venv and do again only what has changed since.
.DELETE_ON_ERROR:
.PHONY: bench clean core docs format gpu-bundle gpu-model gpu-proof help hub lint locks release setup test test-deep test-newest test-release wheel wheels

PYTHON ?= python3
# The one pin of torch. What else is installed stands in locks/, and fits this torch.
TORCH ?= torch==2.13.0
# Workers of pytest, and files compiled at the same time: as the CPUs and the memory that make may use allow.
JOBS ?= $(shell $(PYTHON) tools/environment.py jobs)
# What a wheel or a variant for the Hub is for: cpu, cu12 or cu13.
CUDA ?= cpu
# Doors that a release need not pass, such as tests that CI has just run.
WITHOUT ?=
# Of a proof on a GPU: where it runs, and the only folder that it writes to.
ON ?= cuda
RESULTS ?= bench/results

VENV := .venv
export PATH := $(abspath $(VENV)/bin):$(PATH)
# Make compares times only: what else decides on what is installed and built goes into the stamps' names.
SETTINGS := $(TORCH) with_cuda=$(SINGLEPASS_WITH_CUDA) type=$(SINGLEPASS_BUILD_TYPE) archs=$(TORCH_CUDA_ARCH_LIST)
KEY := $(firstword $(shell echo '$(SETTINGS)' | cksum))
# Each stands on the one before: torch with what building and `make bench` need, the package, what its tests need, and
# what the documentation site needs.
BASE := $(VENV)/.base-$(KEY)
NATIVE := $(VENV)/.native-$(KEY)
PACKAGES := $(VENV)/.packages-$(KEY)
DOCS := $(VENV)/.docs-$(KEY)
SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*' -not -path 'csrc/pybind/*' -not -path 'csrc/simt/*')
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
ENVIRONMENT = $(PYTHON) tools/environment.py
INSTALLS := tools/environment.py $(wildcard locks/*.txt)
# Workers share the cores, so torch gets one thread in each, and its compiler no processes of its own, which would import
# torch again. Triton's cache need not be in a home that may be read-only.
PYTEST_RUN = OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
  TRITON_CACHE_DIR='$(CURDIR)/build/triton' python -m pytest -n $(JOBS) --dist loadgroup --durations 10

help:
	@echo 'make setup        what all others begin with: .venv, and the package built into it'
	@echo 'make test         check the style, build, and run the tests of every day: minutes (PYTEST="-k lion" chooses)'
	@echo 'make test-deep    what takes longer: sanitizers, cubins of all architectures, long property runs'
	@echo 'make test-release what is run by hand before a release: other torches, clean environments; downloads gigabytes'
	@echo 'make test-newest  which newer releases of other packages break a test'
	@echo 'make bench        measure against torch and other packages on this machine, in five minutes (FULL=1 for everything)'
	@echo 'make gpu-proof    prove everything on this machine'"'"'s GPU, with the torch of $(PYTHON) (QUICK=1: what was predicted; ON=cpu rehearses)'
	@echo 'make gpu-model    predict times on GPUs from the compiled kernels, CUDA'"'"'s and Triton'"'"'s, without a GPU; needs nvcc'
	@echo 'make gpu-bundle   pack what has to travel to a machine with a GPU'
	@echo 'make core         the part without torch, and its C++ tests'
	@echo 'make docs         the documentation site, in build/docs/html'
	@echo 'make lint         ruff, mypy and clang-format, without changing a file; make format mends what they can mend'
	@echo 'make locks        move locks/ to the newest releases that fit $(TORCH)'
	@echo 'make wheel        a wheel in dist/ for CUDA=cpu (the default), cu12 or cu13; make wheels: what a release has'
	@echo 'make hub          a variant for the Hugging Face Hub in build/hub/, for CUDA=cpu (the default), cu12 or cu13'
	@echo 'make release      make a release ready in dist/, door by door, and publish nothing; says what is missing'
	@echo 'make clean        remove what building has left; $(VENV) stays'

$(BASE): $(INSTALLS)
	@$(PYTHON) -c '' 2>/dev/null || { echo 'make: expected Python 3.10 to 3.13; got no $(PYTHON). Install it, or name another: make PYTHON=python3.11 ...'; exit 1; }
	@echo 'Setting up $(VENV) with $(TORCH): a few minutes the first time.'
	@rm -f $(VENV)/.base-* $(VENV)/.native-* $(VENV)/.packages-* $(VENV)/.docs-*
	@$(ENVIRONMENT) install $(VENV) '$(TORCH)' bench
	@touch $@

# Editable: a change of Python code needs nothing, and ninja compiles again only the C++ and CUDA files concerned.
$(NATIVE): $(BASE) pyproject.toml setup.py $(SOURCES)
	@echo 'Building the native libraries.'
	@rm -f $(VENV)/.native-*
	@MAX_JOBS=$${MAX_JOBS:-$(JOBS)} $(ENVIRONMENT) editable $(VENV)
	@touch $@

$(PACKAGES): $(NATIVE) $(INSTALLS)
	@$(ENVIRONMENT) install $(VENV) '$(TORCH)' dev
	@touch $@

$(DOCS): $(PACKAGES) $(INSTALLS)
	@$(ENVIRONMENT) install $(VENV) '$(TORCH)' docs
	@touch $@

setup: $(PACKAGES)

# The tests compile the core and its C++ tests by themselves.
test: lint
	@$(PYTEST_RUN) $(PYTEST)

# One of them builds the documentation site.
test-deep: $(DOCS)
	@$(PYTEST_RUN) -m 'deep or hypothesis' --hypothesis-profile=long $(PYTEST)

test-release: $(PACKAGES)
	@$(PYTEST_RUN) -m 'release or large' $(PYTEST)

test-newest: $(PACKAGES)
	@python tools/newest.py '$(TORCH)' $(JOBS)

# Any warning fails: a link that leads nowhere, a page that no list names, a docstring that does not parse.
docs: $(DOCS)
	@python -m sphinx -q -W --keep-going -c docs -d build/docs/doctrees . build/docs/html
	@echo 'build/docs/html/index.html'

locks: $(PACKAGES)
	@python tools/locks.py '$(TORCH)'

# For work on C++ alone: the core, its tests and the NumPy module, none of which needs torch.
core: $(PACKAGES)
	@cmake -S . -B build/cmake -DSINGLEPASS_BUILD_PYBIND=ON -DPython3_EXECUTABLE='$(abspath $(VENV)/bin/python)' --log-level=WARNING
	@MAKEFLAGS= cmake --build build/cmake -j$(JOBS)
	@ctest --test-dir build/cmake --output-on-failure --no-tests=error

bench: $(NATIVE)
	@singlepass bench run $(if $(FULL),--full)

# No environment of its own: the machine's torch and Triton are what is put to the proof, and there may be no network.
gpu-proof:
	@$(PYTHON) -m proof run --device $(ON) --results $(RESULTS) $(if $(QUICK),--quick)

# The cubins are those that the tests read.
gpu-model: $(PACKAGES)
	@cmake -S . -B build/cmake --log-level=WARNING
	@MAKEFLAGS= cmake --build build/cmake --target cubin_check -j$(JOBS)
	@TRITON_CACHE_DIR='$(CURDIR)/build/triton' python -m counting --results $(RESULTS)

# Needs nvcc and a torch with CUDA, such as: make gpu-bundle VENV=.venv-cuda TORCH=torch==2.14.1
gpu-bundle: $(PACKAGES)
	@python -m proof bundle $(if $(PEERS),--peers $(PEERS))

# mypy does not know how an editable installation maps folders to packages: links show it the package as installed.
lint: $(PACKAGES)
	@ruff check .
	@ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/singlepass
	@ln -s $(addprefix ../../../,$(wildcard python/singlepass/*) triton_kernels bench) build/typing/singlepass/
	@PYTHONPATH=build/typing lint-imports --no-cache > build/typing/imports.txt || { cat build/typing/imports.txt; exit 1; }
	@mypy
	@clang-format --dry-run --Werror $(CXX_FILES)

format: $(PACKAGES)
	@ruff check --silent --fix --exit-zero .
	@ruff format .
	@clang-format -i $(CXX_FILES)

# For one CUDA version, or none. A release has two: for CPUs, and for both CUDA versions.
wheel: $(PACKAGES)
	@python tools/wheels.py $(CUDA)

wheels: $(PACKAGES)
	@python tools/wheels.py release

# What the package kernels loads.
hub: $(PACKAGES)
	@python tools/hub.py $(CUDA)

release: $(PACKAGES)
	@python tools/release.py '$(TORCH)' $(WITHOUT)

clean:
	rm -rf build dist python/singlepass.egg-info python/singlepass/_C_*.so python/singlepass/build_info.json
	rm -f $(VENV)/.native-* $(VENV)/.packages-* $(VENV)/.docs-*
