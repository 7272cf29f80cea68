# make demo: what manta does, on the model inside the package. make test: the tests.
# Each sets up what it needs in .venv the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak-scheduler check format clean

demo: .venv/ready
	$(BIN)/manta generate --temperature 0.8 --top-p 0.95 --max-tokens 48 --seed 0 manta-demo \
	  "Hello, my name is" "The president of the United States is" \
	  "The capital of France is" "The future of AI is"
	$(BIN)/manta generate --chat --temperature 0 --max-tokens 100 manta-demo \
	  "What is manta?" "What is the capital of France?" "Tell me a joke."

test: .venv/ready
	$(BIN)/python -m pytest

# 100,000 requests through the scheduler, without a model; some minutes.
soak-scheduler: .venv/ready
	$(BIN)/python -m tests.soak.scheduler

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml tools/setup_venv.sh
	PYTHON=$(PYTHON) tools/setup_venv.sh .venv
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
