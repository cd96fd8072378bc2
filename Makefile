# Every habit of the project is a target. `make help` lists them.

PYTHON ?= python3
# Of `wheelhouse`, PYTHON is the version on the machine that the wheels are for.
HOST_PYTHON := $(if $(filter wheelhouse,$(MAKECMDGOALS)),python3,$(PYTHON))
VENV   ?= .venv
BIN    := $(VENV)/bin

JOB    ?= launcher/jobs/nursery.yaml
RUNS   ?= runs
# One rank a GPU; without one, two CPU ranks, so that ZeRO-2 really shards.
GPUS   := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | wc -l)
NPROC  ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
ARGS   ?=
SEEDS  ?= 1 2 3 4 5
# The machine that `wheelhouse` is for, and where its wheels are put: docs/offline.md
PLATFORM ?= manylinux_2_28_x86_64
TORCH    ?= system
OUT      ?= wheelhouse
# What `gpu-kit` is made of: a job with its corpus, and what the machine has (its `pip freeze`).
KIT_JOB    ?= babyllama
KIT_PYTHON ?= 3.12
SYSTEM     ?=
# All that a shell reads, by their first lines.
SCRIPTS = $(shell git grep -lE '^\#!.*[/ ](ba)?sh( |$$)' -- ':!*.py' ':!*.md')
# What the image's labels say.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' babyllama_ds/__init__.py)
PROVENANCE = --build-arg VERSION=$(VERSION) --build-arg REVISION=$(shell git rev-parse HEAD) --build-arg SOURCE=$(shell git remote get-url origin 2>/dev/null || echo unknown)
# Options of the `deepspeed` launcher itself: --hostfile, --master_port, ...
LAUNCH ?=

export TOKENIZERS_PARALLELISM ?= true
# Spares DeepSpeed's search for an accelerator, and its warning that it found none.
ifeq ($(filter-out 0,$(GPUS)),)
export DS_ACCELERATOR ?= cpu
endif

.DEFAULT_GOAL := help
.PHONY: help setup distill test test-data test-nodes test-lm-eval bench bench-grid bench-host bench-card bench-students grid-objectives gpu-proof gpu-kit check format seeds reference dist wheelhouse lock image docker-test clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(VENV)/.ready  ## make the virtual environment with pinned packages

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(HOST_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(HOST_PYTHON) is $$($(HOST_PYTHON) -V 2>&1), expected Python >= 3.11: make setup PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(HOST_PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

distill: setup  ## run a job: JOB=… RUNS=… NPROC=… ARGS="key=value …"
	$(BIN)/deepspeed --quiet --num_gpus $(NPROC) $(LAUNCH) launcher/run.py $(JOB) --runs $(RUNS) $(ARGS)

test: setup  ## run the tests (no GPU, no corpus needed)
	$(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not data and not nodes"

test-data: setup  ## run the tests on real text: BABYLM_DATA=…
	$(BIN)/pytest -m data

test-nodes: setup  ## run jobs across two hosts made here (root; apt: openssh-server pdsh iproute2)
	$(BIN)/pytest -m nodes

test-lm-eval: setup  ## compare minimal pairs with lm-eval's, item by item (installs it)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lm-eval]'
	$(BIN)/pytest tests/parity/test_lm_eval.py

bench: setup  ## our trainer against the textbook's, on a quiet machine: ARGS="--rounds 5", on a GPU ARGS="--sizes published"
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

bench-grid: setup  ## time a token against vocabulary, teachers, window length and ranks
	$(BIN)/python tests/benchmarks/bench.py --grid $(ARGS)

bench-host: setup  ## what a training step costs the host, by part: ARGS="--rounds 5"
	$(BIN)/python tests/benchmarks/host.py $(ARGS)

bench-card: setup  ## what a training step costs a card, counted without one: ARGS="--bandwidth 4.3 babyllama97/student"
	$(BIN)/python tests/benchmarks/card.py $(ARGS)

bench-students: setup  ## train the students of finished runs again by the textbook: ARGS="runs/nursery-1 …"
	$(BIN)/python tests/benchmarks/students.py $(ARGS)

grid-objectives: setup  ## run a job with several objectives and seeds: ARGS="--seeds 1 2 3 --max-tokens N"
	$(BIN)/python tests/benchmarks/objectives.py --ranks $(NPROC) --runs $(RUNS) $(ARGS)

gpu-proof: setup  ## prove this project on a real GPU, part by part: ARGS="--out DIR --only PART …"
	$(BIN)/python tests/gpu/proof.py $(ARGS)

gpu-kit: setup  ## what an offline GPU machine needs, under 60 MB: BABYLM_DATA=… SYSTEM=freeze.txt
	$(MAKE) wheelhouse PYTHON=$(KIT_PYTHON) TORCH=system SYSTEM=$(SYSTEM) OUT=gpu-kit/wheels
	$(BIN)/python tests/gpu/kit/collect.py --out gpu-kit --job $(KIT_JOB)

check: setup  ## ruff, ruff format, mypy --strict, hadolint, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile

format: setup  ## rewrite the code the way `check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

seeds: setup  ## run JOB with SEEDS (1 to 5) and print the table of gains
	for seed in $(SEEDS); do $(MAKE) --no-print-directory distill ARGS="seed=$$seed $(ARGS)" || exit; done
	$(BIN)/babyllama-ds gains $(foreach s,$(SEEDS),$(RUNS)/$(basename $(notdir $(JOB)))-$s)

reference: setup  ## write docs/jobs.md and the jobs' JSON schema anew
	$(BIN)/babyllama-ds schema > launcher/jobs/job.schema.json
	$(BIN)/babyllama-ds schema --reference > docs/jobs.md

dist: setup  ## build the sdist and the wheel of the last commit into dist/
	@git diff --quiet HEAD || echo "changes that are not committed are left out" >&2
	rm -rf build dist
	mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) PIP_CONSTRAINT=$(CURDIR)/constraints.txt \
	  $(BIN)/pyproject-build --outdir dist build/source

wheelhouse: dist  ## collect wheels for a machine without internet (docs/offline.md): PYTHON=3.12 …
	$(BIN)/python .ci/wheelhouse/collect.py dist/*.whl --out "$(OUT)" --torch "$(TORCH)" \
	  $(if $(filter file,$(origin PYTHON)),,--python "$(PYTHON)") --platform "$(PLATFORM)" \
	  --extras "$(EXTRAS)" --have "$(HAVE)" $(if $(SYSTEM),--system "$(SYSTEM)")

lock: setup  ## write the versions installed here to constraints.txt, and the image's locks
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lm-eval,lock]'
	$(BIN)/pip freeze --all --exclude pip --exclude-editable --exclude babyllama_ds --exclude triton | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' > constraints.txt
	@touch $(VENV)/.ready
	docker/lock.sh

image: setup  ## build the image for GPUs: ARGS="--build-arg MAX_JOBS=16"
	docker build -f docker/Dockerfile -t babyllama_ds:$(VERSION) -t babyllama_ds:latest $(PROVENANCE) $(ARGS) .

docker-test: setup  ## build the image's CPU form, run the nursery in it, read its student outside
	docker/test.sh

clean:  ## remove the environment, caches and builds (runs stay)
	rm -rf $(VENV) build dist wheelhouse gpu-kit *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
