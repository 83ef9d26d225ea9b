# The two commands of the README are `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-faults fuzz lint clean

quickstart: $(VENV)/.run
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/quickstart.py

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# Kills, full disks, damaged files, a soak: what tutorials/reliability.md promises. About six minutes.
test-faults: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow or not slow' tests/test_resume.py tests/test_faults.py

# Tens of thousands of damaged and hostile files for the readers; FUZZ=10000 makes it ten times as many.
fuzz: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_fuzz.py tests/test_strangers.py

# Installed once, and again when the requirements change.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,eval]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info
