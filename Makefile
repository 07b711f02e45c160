# Everything runs in .venv, which is made once and again only when what it is made of changes.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*/*.h csrc/*/*/*.h csrc/cpu/*.cpp)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
SAY := @printf '==> %s\n'

.DEFAULT_GOAL := help
.PHONY: help demo demo-text examples test lint bench sanitize clean

help:
	@echo "make demo    score every training sample of a real data set; writes demo_out/ with a report to look at"
	@echo "make examples  run examples/*.py, notebook-like scripts on real data (a few minutes)"
	@echo "make demo-text  the same on text: docstrings of installed packages and a sentence encoder, offline"
	@echo "make test    run the whole test suite"
	@echo "make lint    check style and imports (ruff)"
	@echo "make bench   measure against floors and rivals; writes JSON and a Markdown table"
	@echo "make sanitize  the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make clean   remove .venv, build folders and the compiled module"
	@echo "The first command makes .venv (a few minutes); later ones start at once. PYTHON=$(PYTHON) WORKERS=$(WORKERS)"

$(STAMP): $(SOURCES)
	$(SAY) "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	$(SAY) "installing torch (constraints.txt)"
	@$(PIP) install torch==2.13.0 -c constraints.txt
	$(SAY) "building the C++ module, installing sui_fast and what its tests, demo and benchmarks need"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/python -c 'from sui_fast import _cpu; print("==> C++ module for", _cpu.instruction_set())' \
		|| echo "==> the C++ module was not built; PyTorch runs in its place"
	@touch $@

demo: $(STAMP)
	$(SAY) "sui-fast demo"
	@$(VENV)/bin/sui-fast demo

# The report is tested in a browser: Chromium is fetched where that needs no question asked, else those tests are skipped.
CHROMIUM := $(VENV)/.chromium
$(CHROMIUM): $(STAMP)
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		printf '==> %s\n' "installing chromium for the tests of the report"; \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core) \
			>/dev/null 2>&1 || printf '==> %s\n' "chromium was not installed; the tests that need it are skipped"; \
	fi
	@touch $@

examples: $(STAMP)
	@for script in examples/*.py; do printf '==> %s\n' "$$script"; \
		HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg $(VENV)/bin/python $$script || exit 1; done

demo-text: $(STAMP)
	$(SAY) "sui-fast demo --text"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/sui-fast demo --text

test: $(STAMP) $(CHROMIUM)
	$(SAY) "pytest, $(WORKERS) processes of one thread each"
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(SAY) "ruff check"
	@$(VENV)/bin/python -m ruff check .

bench: $(STAMP)
	$(SAY) "python -m benchmarks"
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m benchmarks

sanitize: $(STAMP)
	$(SAY) "building with AddressSanitizer and UndefinedBehaviorSanitizer"
	@PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake -S . -B build/sanitize -G Ninja -DSUI_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python -Dpybind11_DIR=$$($(VENV)/bin/python -m pybind11 --cmakedir) \
		-DSUI_OUTPUT_DIRECTORY=$(CURDIR)/build/sanitize/module >/dev/null
	@PATH=$(CURDIR)/$(VENV)/bin:$$PATH cmake --build build/sanitize >/dev/null
	$(SAY) "tests of the C++ kernels"
	@OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
		$(VENV)/bin/python tests/sanitize.py build/sanitize/module

clean:
	$(SAY) "removing $(VENV), build folders and the compiled module"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks sui_fast/_cpu*.so
