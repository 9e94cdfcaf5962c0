# Makes .venv from a fresh clone, and runs the demo, the benchmarks and the tests. `make help` lists the targets.
PYTHON ?= python3
STAMPS := .venv/stamps
# The torch in .venv stays until another version is named.
TORCH ?= $(or $(patsubst torch-%,%,$(notdir $(wildcard $(STAMPS)/torch-*))),2.13.0)

PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check $(PIP_ARGS)
# After torch itself, pip must keep the installed torch, so that no dependency replaces a CPU build.
PIP_MORE := $(PIP) --quiet --constraint .venv/torch.txt
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)

# The tests build the CUDA module wherever it compiles, also without a GPU. Other targets leave it to setup.py (auto).
NVCC := $(firstword $(shell command -v nvcc) $(wildcard $(addsuffix /bin/nvcc,$(CUDA_HOME) /usr/local/cuda)))
CUDA_FOR_TESTS := $(or $(FUSED_SAM_CUDA),$(if $(and $(NVCC),$(wildcard csrc/cuda/*.cu)),1,0))

# It is built for one architecture; tests/test_cuda_machine_code.py compiles the kernels for the others itself.
CUDA_ARCHS_FOR_TESTS := $(or $(FUSED_SAM_CUDA_ARCHS),$(if $(shell nvidia-smi -L 2>/dev/null),native,90))

.PHONY: all build demo bench test campaign test-cpp lint clean distclean help
.DELETE_ON_ERROR:

all: build $(STAMPS)/extra-demo

build: $(STAMPS)/package $(STAMPS)/native

demo: all
	@$(PY) -m fused_sam demo $(ARGS)

bench: build $(STAMPS)/extra-bench
	@$(PY) -m bench $(ARGS)

test: export FUSED_SAM_CUDA = $(CUDA_FOR_TESTS)
test: export FUSED_SAM_CUDA_ARCHS = $(CUDA_ARCHS_FOR_TESTS)
test: $(STAMPS)/extra-dev
	$(PY) setup.py --quiet build_ext --inplace
	@touch $(STAMPS)/native
	@$(MAKE) --no-print-directory test-cpp lint
	$(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

campaign: build $(STAMPS)/extra-dev
	@PYTHONPATH=tests:. $(PY) -m campaign $(ARGS)

test-cpp: $(STAMPS)/build-tools
	@.venv/bin/cmake -S . -B build/test-cpp -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/.venv/bin/ninja" \
	    -DFUSED_SAM_BUILD_MODULES=OFF -DFUSED_SAM_BUILD_TESTS=ON >/dev/null
	@.venv/bin/cmake --build build/test-cpp -- --quiet
	.venv/bin/ctest --test-dir build/test-cpp --output-on-failure --no-tests=error --parallel $$(nproc)

lint: $(STAMPS)/extra-dev
	$(PY) -m ruff check
	$(PY) -m mypy fused_sam bench

clean:
	rm -rf build dist *.egg-info fused_sam/*.so .mypy_cache .pytest_cache .ruff_cache $(STAMPS)/native $(STAMPS)/package

distclean: clean
	rm -rf .venv

help:
	@echo 'make             makes .venv with torch, the package built in place, and what the demo needs'
	@echo 'make demo        compares fused SAM and SGD on real data     (ARGS="--help": its options)'
	@echo 'make bench       times a step against other packages         (ARGS="--help": its options)'
	@echo 'make test        runs C++ tests, ruff, mypy and pytest       (ARGS="-k name": options of pytest)'
	@echo 'make campaign    draws new cases and faults for minutes      (ARGS="--minutes 60": how long; ARGS="--help")'
	@echo 'make lint        runs ruff and mypy alone'
	@echo 'make clean       removes what was built; make distclean removes .venv too'
	@echo
	@echo 'TORCH=2.13.0     the torch version to install; it stays until another one is named'
	@echo 'TORCH_INDEX=URL  the package index for torch alone. Without a GPU give the index of CPU builds that PyTorch'"'"'s'
	@echo '                 "Get started" page names, because the plain Linux package includes gigabytes of CUDA'
	@echo 'PIP_ARGS=...     more options for every pip install; PIP_INDEX_URL, PIP_FIND_LINKS and the like work as usual'
	@echo 'PYTHON=python3   the interpreter for .venv, 3.10 or newer'
	@echo 'FUSED_SAM_CUDA=auto    builds the CUDA module: 0 no, 1 yes (needs nvcc), auto if there are nvcc and a GPU'
	@echo 'FUSED_SAM_CUDA_ARCHS=  GPU architectures, such as 90 or "80;90", or native; empty means all'

$(STAMPS)/venv:
	@PYTHON="$(PYTHON)" tools/bootstrap.sh
	@$(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch-$(TORCH): | $(STAMPS)/venv
	@echo 'installing torch $(TORCH)$(if $(shell nvidia-smi -L 2>/dev/null)$(TORCH_INDEX),, (there is no GPU here; if gigabytes are downloaded, see TORCH_INDEX in make help))'
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	@rm -f $(STAMPS)/torch-* && echo 'torch==$(TORCH)' > .venv/torch.txt && touch $@

# The packages for the build are listed once, in pyproject.toml; xargs reads the quoted words.
$(STAMPS)/build-tools: pyproject.toml $(STAMPS)/torch-$(TORCH)
	@sed -n '/^requires = /{s/.*\[//;s/\].*//;s/", "/" "/g;p;}' pyproject.toml | xargs $(PIP_MORE)
	@touch $@

# Not through pip, whose output would hide the one line that says what is wrong.
$(STAMPS)/native: $(NATIVE) $(STAMPS)/build-tools
	@echo 'building the native modules'
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(STAMPS)/package: pyproject.toml setup.py $(STAMPS)/build-tools | $(STAMPS)/native
	@$(PIP_MORE) --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/package
	@echo "installing what '$*' needs"
	@$(PIP_MORE) 'fused_sam[$*]'
	@touch $@
