# make demo: what manta does, on the model inside the package. make test: the tests.
# make serve: a server with that model, until Ctrl-C. Each sets up what it needs the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: system system-test demo serve test soak-scheduler soak-serve soak-hostile soak-chaos soak-faults soak-hosts check format clean

# What is missing of the system: installed as root, else named.
system:
	PYTHON=$(PYTHON) tools/setup_system.sh demo

system-test:
	PYTHON=$(PYTHON) tools/setup_system.sh test

demo: .venv/ready
	$(BIN)/python tools/demo.py

serve: .venv/ready
	$(BIN)/manta serve

test: system-test .venv/ready tests/node/node_modules/.ready
	$(BIN)/python -m pytest

# 100,000 requests through the scheduler, without a model; some minutes.
soak-scheduler: .venv/ready
	$(BIN)/python -m tests.soak.scheduler

# Two minutes of 64 streams on a server, with clients that vanish.
soak-serve: .venv/ready
	$(BIN)/python -m tests.soak.server

# Two minutes of hostile clients, requests and checkpoints beside 20 streams; on loopback only.
soak-hostile: .venv/ready
	$(BIN)/python -m tests.soak.hostile

# 1,000 requests over 100 engines killed, stopped, drained and reshaped; half an hour.
soak-chaos: .venv/ready
	$(BIN)/python -m tests.soak.chaos

# Workers killed, stopped and spoilt, 20 times each; half an hour.
soak-faults: .venv/ready
	$(BIN)/python -m tests.soak.faults

# As root: two hosts with their own addresses, as network namespaces; workers, then a server.
soak-hosts: .venv/ready
	$(BIN)/python -m tests.soak.hosts
	$(BIN)/python -m tests.soak.serve_hosts

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml tools/setup_venv.sh | system
	PYTHON=$(PYTHON) tools/setup_venv.sh .venv
	touch $@

# The OpenAI client for Node, for the tests.
tests/node/node_modules/.ready: tests/node/package-lock.json | system-test
	npm ci --no-audit --no-fund --prefix tests/node
	touch $@

clean:
	rm -rf .venv build dist *.egg-info tests/node/node_modules
