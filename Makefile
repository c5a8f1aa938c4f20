# Everything that a fresh machine needs is set up by the targets themselves.
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INDEX ?=
VENV ?= .venv
OLDEST ?= .venv-oldest
VENV_VLLM ?= .venv-vllm
VENV_TRL ?= .venv-trl
VENV_PROCESSORS ?= .venv-processors
VENV_SERVE ?= .venv-serve
# The lowest that pyproject.toml allows; a test holds that they agree.
OLDEST_TORCH = 2.9.0
OLDEST_TRANSFORMERS = 5.16.0
export PYTHON TORCH TORCH_INDEX
# What an environment is made of; where one of these is newer, it is made anew.
SETUP = pyproject.toml packages/vlmprune-embedded/pyproject.toml scripts/setup.sh

.PHONY: demo test test-oldest test-releases test-between test-newest move-bound test-wheels test-vllm test-processors test-serve test-train lint bench train clean

demo: $(VENV)/.demo
	@echo "Measuring: within 90 seconds on two cores, with QUICK=1 within 20." >&2
	@$(VENV)/bin/python scripts/first_run.py $(if $(QUICK),--quick)

# One process a core, each with one thread.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

test-oldest: $(OLDEST)/.test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto

# What hangs on Transformers, on each minor that pyproject.toml allows; and for CI, which runs all of
# the suite on the lowest and the last, a third of it on each between them.
test-releases: $(VENV)/.test
	$(VENV)/bin/python scripts/releases.py tested
test-between: $(VENV)/.test
	$(VENV)/bin/python scripts/releases.py between

# The whole suite on what the package index has beyond those, and the same before allowing it.
test-newest: $(VENV)/.test
	$(VENV)/bin/python scripts/releases.py newest
move-bound: $(VENV)/.test
	$(VENV)/bin/python scripts/releases.py move

# Both wheels, installed in an empty environment outside the checkout and used there.
test-wheels:
	$(PYTHON) scripts/wheels.py

# The vLLM plugin, in servers of vLLM's CPU build.
test-vllm: $(VENV_VLLM)/.vllm
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest tests/vllm

# The page on training with pruned tokens, with TRL.
test-train: $(VENV_TRL)/.trl
	OMP_NUM_THREADS=1 $(VENV_TRL)/bin/python -m pytest tests/trainers

# What the families' own processors make of pictures, with torchvision, which nothing else needs.
test-processors: $(VENV_PROCESSORS)/.processors
	OMP_NUM_THREADS=1 VLMPRUNE_TEST_TORCHVISION=1 $(VENV_PROCESSORS)/bin/python -m pytest -n auto tests/processors

# The examples: `transformers serve` with a pruner, and a chat, in Chromium where there is one.
test-serve: $(VENV_SERVE)/.serve
	OMP_NUM_THREADS=1 $(VENV_SERVE)/bin/python -m pytest -rs examples/tests

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python scripts/door.py
	$(VENV)/bin/lint-imports --no-cache

bench: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/selection.py

# Sets the environment up and shows the steps; they take hours, see the model card.
train: $(VENV)/.train
	@cd training/embedded && ../../$(VENV)/bin/python train.py --help

clean:
	rm -rf $(VENV) $(OLDEST) $(VENV_VLLM) $(VENV_PROCESSORS) $(VENV_SERVE) $(VENV_TRL) .venv-releases demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.demo: $(SETUP)
	@sh scripts/setup.sh $(VENV) ""
	@touch $@

$(VENV)/.test: $(SETUP)
	@sh scripts/setup.sh $(VENV) "[test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(SETUP)
	@sh scripts/setup.sh $(VENV) "[dev]"
	@touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.train: $(SETUP)
	@sh scripts/setup.sh $(VENV) "[train]"
	@touch $@ $(VENV)/.demo

$(OLDEST)/.test: $(SETUP)
	@# The interpreter of that torch's Triton, which tests alone use, fails on later NumPys.
	@TORCH=$(OLDEST_TORCH) EXACT=1 sh scripts/setup.sh $(OLDEST) "[test]" \
	  "transformers==$(OLDEST_TRANSFORMERS)" "numpy<2.4"
	@touch $@

$(VENV_TRL)/.trl: $(SETUP)
	@sh scripts/setup.sh $(VENV_TRL) "[test]" "trl>=1.16,<2" "datasets>=4"
	@touch $@

$(VENV_PROCESSORS)/.processors: $(SETUP) scripts/setup-processors.sh \
  tests/vllm/bootstrap/torchvision_operators.py
	@sh scripts/setup-processors.sh $(VENV_PROCESSORS)
	@touch $@

$(VENV_SERVE)/.serve: $(SETUP)
	@sh scripts/setup.sh $(VENV_SERVE) "[test]" fastapi uvicorn openai gradio
	@touch $@

$(VENV_VLLM)/.vllm: $(SETUP) scripts/setup-vllm.sh
	@sh scripts/setup-vllm.sh $(VENV_VLLM)
	@touch $@
