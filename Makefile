# Each command makes .venv itself, and does so only once. PYTHON=/path/to/python names the interpreter to make it from.

.PHONY: help train test lint format

help:
	@echo "make train    train a small byte-level Mamba on the built-in corpus, then generate a sample"
	@echo "make test     run every test"
	@echo "make lint     check format, lint and types"
	@echo "make format   format the code, and mend what the linter can"

# With a GPU the same command trains a larger preset.
train:
	@.ci/bootstrap
	@preset=quickstart; \
	if .venv/bin/python -c 'import sys, jax; sys.exit(jax.default_backend() != "gpu")'; then preset=quickstart_gpu; fi; \
	set -ex; \
	.venv/bin/mamba-jax train --gin_file configs/$$preset.gin --workdir runs/$$preset; \
	.venv/bin/mamba-jax generate --checkpoint runs/$$preset

# The two processes share a GPU where there is one, so neither may take its memory in advance.
test:
	@.ci/bootstrap dev
	XLA_PYTHON_CLIENT_PREALLOCATE=false .venv/bin/python -m pytest -n 2 --dist loadfile

lint:
	@.ci/bootstrap dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

format:
	@.ci/bootstrap dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
