# SPDX-License-Identifier: Apache-2.0
# `make test` and `make bench` set up what they need in .venv and do again only what has changed since.
.DELETE_ON_ERROR:
.PHONY: bench clean core format gpu-bundle gpu-proof help lint setup test wheel

PYTHON ?= python3
# The torch of the development environment. Every pip install below names it, so that none replaces it.
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
# Of a proof on a GPU: where it runs, and the only folder that it writes to.
ON ?= cuda
RESULTS ?= bench/results

VENV := .venv
export PATH := $(abspath $(VENV)/bin):$(PATH)
# Make compares times only: what else decides on what is installed and built goes into the stamps' names.
SETTINGS := $(TORCH) with_cuda=$(SINGLEPASS_WITH_CUDA) type=$(SINGLEPASS_BUILD_TYPE) archs=$(TORCH_CUDA_ARCH_LIST)
KEY := $(firstword $(shell echo '$(SETTINGS)' | cksum))
PACKAGES := $(VENV)/.packages-$(KEY)
NATIVE := $(VENV)/.native-$(KEY)
SOURCES := $(shell find csrc -type f -not -path 'csrc/tests/*' -not -path 'csrc/pybind/*')
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

help:
	@echo 'make test    check the style, build, and run every test that this machine can run (PYTEST="-k lion" chooses)'
	@echo 'make bench   measure against eager PyTorch on this machine, in under five minutes (FULL=1 for everything)'
	@echo 'make gpu-proof   prove everything on this machine'"'"'s GPU, with the torch of $(PYTHON) (ON=cpu rehearses)'
	@echo 'make gpu-bundle  pack what has to travel to a machine with a GPU'
	@echo 'make core    the part without torch, and its C++ tests'
	@echo 'make lint    ruff, mypy and clang-format, without changing a file; make format mends what they can mend'
	@echo 'make wheel   a wheel, in dist/'
	@echo 'make clean   remove what building has left; $(VENV) stays'

# First what building needs: the package is built without isolation, against this very torch.
$(PACKAGES): pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo 'Setting up $(VENV) with $(TORCH): a few minutes the first time.'
	@rm -f $(VENV)/.packages-* $(VENV)/.native-*
	@python -m pip install -q '$(TORCH)' 'setuptools>=77' ninja numpy
	@touch $@

# Editable: a change of Python code needs nothing, and ninja compiles again only the C++ and CUDA files concerned.
$(NATIVE): $(PACKAGES) setup.py $(SOURCES)
	@echo 'Building the native libraries.'
	@rm -f $(VENV)/.native-*
	@python -m pip install -q '$(TORCH)' --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(NATIVE)

# The tests compile the core and its C++ tests by themselves.
test: lint
	@python -m pytest $(PYTEST)

# For work on C++ alone: the core, its tests and the NumPy module, none of which needs torch.
core: $(NATIVE)
	@cmake -S . -B build/cmake -DSINGLEPASS_BUILD_PYBIND=ON -DPython3_EXECUTABLE=$(abspath $(VENV)/bin/python) --log-level=WARNING
	@MAKEFLAGS= cmake --build build/cmake -j$(JOBS)
	@ctest --test-dir build/cmake --output-on-failure --no-tests=error

bench: $(NATIVE)
	@singlepass bench run $(if $(FULL),--full)

# No environment of its own: the machine's torch and Triton are what is put to the proof, and there may be no network.
gpu-proof:
	@$(PYTHON) -m proof run --device $(ON) --results $(RESULTS)

# Needs nvcc and a torch with CUDA, such as: make gpu-bundle VENV=.venv-cuda TORCH=torch==2.14.1
gpu-bundle: $(NATIVE)
	@python -m proof bundle $(if $(PEERS),--peers $(PEERS))

# mypy does not know how an editable installation maps folders to packages: links show it the package as installed.
lint: $(NATIVE)
	@ruff check .
	@ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/singlepass
	@ln -s $(addprefix $(CURDIR)/,$(wildcard python/singlepass/*) triton_kernels bench) build/typing/singlepass/
	@mypy
	@clang-format --dry-run --Werror $(CXX_FILES)

format: $(NATIVE)
	@ruff check --silent --fix --exit-zero .
	@ruff format .
	@clang-format -i $(CXX_FILES)

wheel: $(NATIVE)
	@python -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist python/singlepass.egg-info python/singlepass/_C_*.so python/singlepass/build_info.json
	rm -f $(VENV)/.native-*
