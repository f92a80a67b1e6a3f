# make demo and make test need Python >= 3.10 and a package registry; the rest they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Slow tests that CI runs beside make test: real launches, kills in every mode, whole programs.
CI_TESTS := $(wildcard tests/test_trl*.py) $(addprefix tests/test_, \
  bench.py bench_distillation.py cli.py docs.py drop_ins.py gpu_proof.py hf_adapters.py hf_trainer_ranks.py) \
  $(addprefix tests/training/test_,architectures.py base_penalty.py completions.py demo.py gpu_24gb.py \
  graders.py grading.py launch.py measured_memory.py memory_plan.py plan_command.py ranks.py report.py study.py suite.py)

.PHONY: demo test test-ci test-all test-architectures lint build dist-check docs bench bench-train gpu gpu-24gb clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/em-kernels demo $(DEMO_ARGS)

# A test process for each CPU; TEST_ARGS='-n 0 tests/test_rows.py -k bf16' runs some tests in one process.
test: $(INSTALLED)
	@$(BIN)/python -m pytest -n auto --dist worksteal $(TEST_ARGS)

test-ci: $(INSTALLED)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m 'slow and not gpu' $(CI_TESTS)

test-all: $(INSTALLED)
	@$(BIN)/python -m pytest -n auto --dist worksteal -m 'not gpu' $(TEST_ARGS)

# Tries every causal architecture of transformers, and writes the results to docs/architectures.md.
test-architectures: $(INSTALLED)
	@cd tests && ../$(BIN)/python -m training.architectures

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

build: $(INSTALLED)
	@$(BIN)/python setup.py --quiet build_ext --inplace --force
	@$(BIN)/em-kernels info

# Wheel and sdist of the last commit, into dist/; each tried in an empty environment, from the package registry.
dist-check: $(INSTALLED)
	@$(BIN)/python tests/dist_check.py

docs: $(INSTALLED)
	@$(BIN)/mkdocs build --strict --quiet && echo site/index.html

bench: $(INSTALLED)
	@$(BIN)/python -m pytest benchmarks/bench_*.py -rs --benchmark-disable-gc --benchmark-columns=median,iqr,rounds

bench-train: $(INSTALLED)
	@$(BIN)/python -m benchmarks.bench_train $(BENCH_ARGS)

gpu: $(INSTALLED)
	@$(BIN)/python -m benchmarks.gpu_proof $(GPU_ARGS)

gpu-24gb: $(INSTALLED)
	@$(BIN)/python -m benchmarks.gpu_24gb $(GPU_ARGS)

# The stamp is written last; an interrupted installation is begun anew, from pip's cache.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: Python 3.10 or later is needed; install it, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@test $$(df -Pk . | awk 'NR == 2 {print $$4}') -gt 3000000 || { \
	  echo "make: under 3 GB of disk space are left here; free some (with CUDA 10 GB are needed)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null 2>&1 || command -v g++ >/dev/null 2>&1 || { \
	  echo "make: no C++ compiler: the CPU will use the slower portable row kernels."; \
	  echo "make: for the fast ones, install one (Debian: apt-get install g++) and run make build"; }
	@test ! -e $(VENV)/.installing || rm -rf $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { \
	  echo "make: no virtual environment: install Python's venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@touch $(VENV)/.installing
	@echo "make: installing into $(VENV); the first time takes minutes (PyTorch is large)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools ninja && \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	    --editable '.[train,eval,bench,dev]' || { \
	  echo "make: the installation failed: is a package registry in reach (pip config list), is the disk full?" >&2; \
	  echo "make: run the same command again; it begins anew, from pip's cache" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt reasoning-gym || \
	  echo "make: no reasoning-gym (one of its parts is compiled): --data gym:TASK will not work"
	@rm $(VENV)/.installing && touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info em_kernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
