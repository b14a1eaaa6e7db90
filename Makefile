# Two commands: `make quickstart` runs the main job, `make test` passes the tests. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup quickstart test oracle lint docs benchmark

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: setup
	$(BIN)/luthier run recipes/quickstart.yaml
	$(BIN)/luthier chat quickstart/gguf --variant Q4_K_M \
		--ask "could you turn on the lamp in the office" \
		--ask "it is windy, close the window in the cellar" \
		--ask "set the kitchen speaker to 25 percent" \
		--ask "remind me at 4 pm to clean the oven"

# A file of tests to a process, each with one thread: processes that share the cores with several slow each other down.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered --cov-report=xml --durations=15

# Comparisons with other programs, each installed into an environment of its own.
oracle: setup
	LUTHIER_ORACLES=$(CURDIR)/.oracles $(BIN)/python -m pytest tests/oracle tests/plugins/test_quantizers.py --durations=15

lint: setup
	$(BIN)/ruff check core plugins tests docs
	$(BIN)/ruff format --check core plugins tests docs
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python docs/generate.py

benchmark: setup
	$(BIN)/python tests/benchmarks/shell.py
	$(BIN)/python tests/benchmarks/merge.py
