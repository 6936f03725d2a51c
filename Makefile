# `make run` and `make test` do all the set-up on a fresh machine with Python 3.11, pip and venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PROTO ?= http
HOST ?= 127.0.0.1
PORT ?= 8000
POOL_SIZE ?= 1

TRY_http = curl -i http://127.0.0.1:$(PORT)/
TRY_echo = nc 127.0.0.1 $(PORT)   (type a line)
TRY_iso8583 = $(BIN)/python examples/iso8583_client.py $(PORT)
TRY_mpu = $(BIN)/python examples/iso8583_client.py --header digits $(PORT)

# What is not set has the default that `--help` of the command tells.
LOAD = $(if $(TARGET_DELAY),--delay $(TARGET_DELAY)) $(if $(PIPELINE),--pipeline $(PIPELINE)) \
	$(if $(SECONDS),--seconds $(SECONDS))
LOADTEST = $(LOAD) $(if $(USERS),--users $(USERS)) $(if $(RATE),--rate $(RATE))
BENCH = $(LOAD) $(if $(CLIENTS),--clients $(CLIENTS)) $(if $(ROUNDS),--rounds $(ROUNDS))

.PHONY: run test style types tests chaos hostile soak docs format loadtest bench clean

run: $(VENV)/installed
	@echo "gmux: $(PROTO) on port $(PORT), with a target inside that takes $(POOL_SIZE) connection(s); ^C ends it."
	@echo "Try in another terminal: $(or $(TRY_$(PROTO)),a client of $(PROTO))"
	@$(BIN)/gmux server -p $(PROTO) -l $(HOST):$(PORT) -t embedded --pool-size $(POOL_SIZE)

test: style types tests

style: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tested
	$(BIN)/mypy

tests: $(VENV)/tested
	$(BIN)/pytest -q -n logical --maxprocesses 4

# Workers, masters and reloads killed at random. make chaos CHAOS_SECONDS=600 CHAOS_SEED=7
chaos: $(VENV)/tested
	CHAOS_SECONDS=$(or $(CHAOS_SECONDS),60) $(BIN)/pytest -q -s tests/test_chaos.py

# One route under attack, another one served: about 13 minutes on a quiet machine. make hostile HOSTILE_SECONDS=10
hostile: $(VENV)/tested
	HOSTILE_SECONDS=$(or $(HOSTILE_SECONDS),3) $(BIN)/pytest -q -s tests/test_hostile.py

# A million exchanges with targets that misbehave in every way. make soak SOAK_EXCHANGES=100000 SOAK_SEED=7
# With SOAK_MINUTES, all attacks at once for that many minutes, at least 3: nothing may grow. make soak SOAK_MINUTES=20
soak: $(VENV)/tested
	$(if $(SOAK_MINUTES),SOAK_MINUTES=$(SOAK_MINUTES),SOAK_EXCHANGES=$(or $(SOAK_EXCHANGES),1000000)) \
		$(BIN)/pytest -q -s $(if $(SOAK_MINUTES),tests/test_endurance.py,tests/test_soak.py)

# The reference of the settings; a test fails where it is stale.
docs: $(VENV)/installed
	$(BIN)/python -m gmux.reference > docs/settings.md

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make loadtest PROTO=iso8583 TARGET_DELAY=2ms USERS=1,50 RATE=10 POOL_SIZE=1 PIPELINE=32 SECONDS=4
loadtest: $(VENV)/loadtested
	@$(BIN)/python -m loadtest.run --proto $(PROTO) --pool-size $(POOL_SIZE) $(LOADTEST)

# make bench PROTO=http CLIENTS=1,16,128 ROUNDS=3 TARGET_DELAY=2ms POOL_SIZE=1 PIPELINE=32 SECONDS=2
bench: $(VENV)/installed
	@$(BIN)/python -m loadtest.bench --proto $(PROTO) --pool-size $(POOL_SIZE) $(BENCH)

clean:
	rm -rf $(VENV) loadtest/out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/tested: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test]'
	@touch $@ $(VENV)/installed $(VENV)/loadtested

$(VENV)/loadtested: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[loadtest]'
	@touch $@ $(VENV)/installed
