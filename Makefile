# Everything from a machine with Python, a C++20 compiler and make: `make help`.

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0

# Arguments for pytest, mrcn-fast demo, mrcn-fast bench, gpu-check and gpu-probe: make test ARGS="-k gates -x"
ARGS ?=

# Where `make wheel` leaves the wheel.
DIST ?= dist

# pip would compile all of the ten thousand modules of torch and the others, of which a run imports some hundreds.
# Python compiles those when it imports them, and keeps them. (This setting's 0 is --no-compile.)
export PIP_NO_COMPILE ?= 0

# V=1 shows the output of pip, CMake and the compilers, which otherwise is shown where one of them fails.
V ?=

bin = $(VENV)/bin
pip = "$(bin)/python" -m pip --disable-pip-version-check
built = build/warnings

# Read from pyproject.toml, where pip finds them too.
build_requirements = $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ' "' | tr ',' ' ')

# What an install depends on: these files, and where the checkout lies (an editable install points to it).
fingerprint = { pwd; cat pyproject.toml setup.py mrcn_fast/__init__.py; } | cksum
# Which packages an install brings: those that run the library, with EXTRAS=all those of the tests too, or with
# EXTRAS=docs those of the site, which `all` is without.
EXTRAS = reid
installed = $(VENV)/.mrcn-fast-installed
kept = $(VENV)/.mrcn-fast-constraints.txt

# Empty where there is none, or it is not wanted.
nvcc = $(if $(filter 0,$(MRCN_FAST_CUDA)),,$(shell "$(bin)/python" -c "import setup; print(setup.find_nvcc())" 2>&-))

# quietly COMMAND...: runs it without its output, says every 15 s that it goes on, and shows the end of the output
# where it fails.
define quietly
quietly() { \
  if [ -n "$(V)" ]; then "$$@"; return; fi; \
  output=$$(mktemp) || return; seconds=0; \
  while sleep 15 >&- 2>&-; do seconds=$$((seconds + 15)); echo "  $$seconds s so far"; done & beat=$$!; \
  trap 'kill $$beat; rm -f "$$output"' EXIT; trap 'exit 130' INT TERM; \
  if "$$@" >"$$output" 2>&1; then status=0; else status=$$?; tail -n 60 "$$output" >&2; fi; \
  kill $$beat; rm -f "$$output"; trap - EXIT INT TERM; return $$status; \
}
endef

cxx_sources = find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help install environment torch requirements native wheel demo readme-figures test bench regression gpu-check gpu-probe \
  lint ruff mypy clang-format schemas warnings format docs clean
# The steps of an install follow one another; nothing here gains from -j.
.NOTPARALLEL:

help:  ## this list
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH='$(TORCH)' V=1 (show the output of pip and the compilers)"
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1\t\2/p' Makefile | expand -t 18

test lint regression format: EXTRAS = all
docs: EXTRAS = docs
# Tests are of all instruction sets, a user needs those of this machine.
test regression: export MRCN_FAST_ISAS ?= all

install: environment torch requirements native  ## make the environment VENV, build the libraries, install there what runs them
	@"$(bin)/mrcn-fast" info
	@echo
	@echo "Installed in $(VENV). To have the command mrcn-fast: source $(bin)/activate"

# Of a failed try only a folder is removed that was not there before.
environment:
	@if [ -z "$(VENV)" ]; then echo "VENV is empty; name a folder, as in make install VENV=.venv" >&2; exit 1; fi
	@if [ ! -x "$(bin)/python" ]; then \
	  if ! command -v "$(PYTHON)" >/dev/null; then \
	    echo "PYTHON=$(PYTHON) was not found; install Python 3.10 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, PYTHON=$(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=/path/to/a/newer/python3")' || exit 1; \
	  if [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ]; then \
	    echo "VENV=$(VENV) is a folder with something else in it; name an environment or a new folder" >&2; exit 1; \
	  fi; \
	  echo "Making the environment $(VENV)"; \
	  mkdir -p "$$(dirname "$(VENV)")"; new=; if mkdir "$(VENV)" 2>/dev/null; then new=1; fi; \
	  if ! "$(PYTHON)" -m venv "$(VENV)"; then \
	    if [ -n "$$new" ]; then rm -rf "$(VENV)"; fi; \
	    echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; \
	  fi; \
	fi
	@"$(bin)/python" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, the environment $(VENV) has " + sys.version.split()[0])'
	@$(pip) --version >/dev/null 2>&1 || "$(bin)/python" -m ensurepip >/dev/null \
	  || { echo "The environment $(VENV) has no pip; install pip there, or name another VENV" >&2; exit 1; }

# torch comes before anything that depends on it, and a torch that is new enough is kept whatever asks
# for another: which build of torch a machine needs (CPU, a CUDA version) its owner knows, pip doesn't.
torch:
	@"$(bin)/python" -c 'import re, sys; from importlib import metadata; sys.exit(tuple(map(int, re.findall("[0-9]+", metadata.version("torch"))[:2])) < (2, 11))' 2>/dev/null \
	  || { echo "Installing $(TORCH) into $(VENV): a download of 0.2 GB for the CPU, of 3 GB for CUDA"; \
    $(quietly); quietly $(pip) install "$(TORCH)"; }
	@"$(bin)/python" -c 'from importlib import metadata; print("torch==" + metadata.version("torch"))' > "$(kept)"

requirements:
	@$(quietly); is_of() { [ "$$(cat "$(installed)-$$1" 2>/dev/null)" = "$$($(fingerprint))" ]; }; \
	if [ ! -x "$(bin)/mrcn-fast" ] || ! { is_of $(EXTRAS) || { [ $(EXTRAS) != docs ] && is_of all; }; }; then \
	  echo "Installing mrcn-fast[$(EXTRAS)] and what it needs into $(VENV), about half a minute"; \
	  quietly $(pip) install -c "$(kept)" $(foreach r,$(build_requirements),"$(r)") \
	  && MRCN_FAST_NATIVE=0 MRCN_FAST_CUDA=0 quietly $(pip) install -c "$(kept)" --no-build-isolation -e '.[$(EXTRAS)]' \
	  && $(fingerprint) > "$(installed)-$(EXTRAS)"; \
	fi

# Not by pip, which would hide the compilers' output. Ninja rebuilds only what changed.
native:
	@"$(bin)/python" setup.py $(if $(V),,-q) build_ext --inplace

# auditwheel, where it is installed, checks that the wheel runs on other distributions, and marks it so.
wheel: environment torch requirements  ## build a wheel into DIST (dist/), for machines without a compiler
	@rm -rf build/wheel && mkdir -p "$(DIST)"
	@echo "Building the wheel, for every instruction set: some minutes"
	@$(quietly); quietly $(pip) wheel --no-deps --no-build-isolation -w build/wheel . \
	&& if [ -x "$(bin)/auditwheel" ]; then \
	  quietly "$(bin)/auditwheel" repair --exclude 'libtorch*' --exclude 'libc10*' -w "$(DIST)" build/wheel/*.whl; \
	else mv build/wheel/*.whl "$(DIST)"; fi
	@ls -t "$(DIST)"/*.whl | head -n 1

demo: install  ## train and score the baseline and MRCN on synthetic images (6 to 15 minutes after the install)
	@echo "Training and scoring three networks on synthetic images, 6 to 15 minutes on two cores"
	@"$(bin)/mrcn-fast" demo $(ARGS)

# ARGS="--demo runs/demo" shows the ranking lists of another demo.
readme-figures: install  ## draw the pictures of README.md and of docs/performance.md from benchmarks/results
	@"$(bin)/python" benchmarks/readme_figures.py $(ARGS)

# In two processes: the tests' tensors are small, and much of the time one of them compiles or interprets kernels.
# Where both compute, threads that spin while they wait would take the other's processor: half of the time.
test: install  ## the tests
	OMP_WAIT_POLICY=passive "$(bin)/python" -m pytest -n 2 --dist worksteal $(ARGS)

bench: install  ## the benchmark table: times, ratios, floors; make bench ARGS=step for another one
	@"$(bin)/mrcn-fast" bench $(or $(ARGS),kernels)

# Alone on the machine as far as that goes: nothing else of the check runs beside it.
regression: install  ## whether the kernels are still as many times faster than plain PyTorch
	"$(bin)/python" -m pytest -q benchmarks/test_regression.py

# Installs nothing: which torch fits the GPU its owner knows, and has it in VENV or as PYTHON's.
gpu-check:  ## on this machine's GPU: the tests, compute-sanitizer, the benchmark (needs torch and Triton there)
	@$(if $(wildcard $(bin)/python),"$(bin)/python","$(PYTHON)") benchmarks/gpu_check.py $(ARGS)

# One command of eight minutes; `benchmarks/gpu_probe.py --build` compiles what it carries, where there is nvcc.
gpu-probe:  ## on this machine's GPU: the experiments that decide about the kernels, in at most 8 minutes
	@$(if $(wildcard $(bin)/python),"$(bin)/python","$(PYTHON)") benchmarks/gpu_probe.py $(ARGS)

lint: install ruff mypy clang-format schemas  ## ruff, mypy, clang-format and schemas (make -k lint: all, also after one has failed)

ruff:
	"$(bin)/ruff" check
	"$(bin)/ruff" format --check

mypy:
	"$(bin)/mypy"

clang-format:
	$(cxx_sources) | tr '\n' '\0' | xargs -0 "$(bin)/clang-format" --dry-run --Werror

# The package brings these schemas along.
schemas:
	"$(bin)/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yml
	"$(bin)/check-jsonschema" --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml
	"$(bin)/check-jsonschema" --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	"$(bin)/check-jsonschema" --builtin-schema vendor.citation-file-format CITATION.cff

warnings: install  ## compile the libraries with -Wall -Wextra -Werror
	bin=$$(cd "$(bin)" && pwd) && "$$bin/cmake" -S . -B $(built) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM="$$bin/ninja" -DPython_EXECUTABLE="$$bin/python" -DMRCN_FAST_WERROR=ON \
	  -DMRCN_FAST_NVCC="$(nvcc)"
	"$(bin)/cmake" --build $(built)

format:  ## rewrite the sources in the project's format
	"$(bin)/ruff" check --fix
	"$(bin)/ruff" format
	$(cxx_sources) | tr '\n' '\0' | xargs -0 "$(bin)/clang-format" -i

docs: install  ## the documentation as a site in build/site/, to be opened there as index.html
	NO_MKDOCS_2_WARNING=1 "$(bin)/mkdocs" build --strict

clean:  ## remove what builds left (no environment, not runs/)
	for path in build/*; do find "$$path" build/pyvenv.cfg -name pyvenv.cfg 2>&- | grep -q . || rm -rf "$$path"; done
	rm -rf dist *.egg-info mrcn_fast/_C.* mrcn_fast/_storage.so mrcn_fast/_cuda.so mrcn_fast/_native_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find mrcn_fast tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
