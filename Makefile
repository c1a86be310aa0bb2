# Everything that is done to this repository by hand or by CI. `make help` lists it.
.DEFAULT_GOAL := help

PYTHON ?= python3
LOCK ?= requirements/cpu.lock
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/$(notdir $(LOCK))

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) ## .venv with the pinned dependencies; PYTHON=python3.12, LOCK=requirements/cuda.lock

# The stamp is a copy of the lock inside the environment: a failed setup leaves none, and another lock has another.
$(STAMP): $(LOCK)
	bash scripts/setup.sh $(PYTHON) $(VENV) $(LOCK)
	@cp $(LOCK) $@

.PHONY: test
test: setup ## every test; those marked `launch` start several processes each and come last, two files at a time
	@bash scripts/install_slurm.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not launch" -n 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m launch -n 2 --dist loadfile

.PHONY: lint
lint: setup ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: demo
demo: setup ## uniform against OP-Mix on the built-in corpus, from data to report, on the CPU
	bash scripts/demo.sh

DEMOS := demo-single demo-fsdp demo-deepspeed demo-megatron
.PHONY: $(DEMOS)
demo-single demo-fsdp demo-deepspeed demo-megatron: demo-%: setup ## a whole OP-Mix job under one engine, tiny, on the CPU
	bash scripts/demo_engine.sh $*

.PHONY: demo-engines
demo-engines: $(DEMOS) ## the same job under each engine, and their tables side by side
	COLUMNS=160 $(BIN)/opmix compare $(DEMOS:demo-%=$${RUNS:-runs/demo_engines}/%)

.PHONY: resume-matrix
resume-matrix: setup ## every engine continues every other's checkpoint; writes benchmarks/results/resume_matrix.md
	OMP_NUM_THREADS=1 RESUME_MATRIX=benchmarks/results/resume_matrix.md $(BIN)/python -m pytest tests/engines/test_resume_matrix.py

.PHONY: evidence-small
evidence-small: setup ## the small benchmark that the documentation quotes
	$(BIN)/python benchmarks/evidence_small.py

.PHONY: evidence-lifecycle
evidence-lifecycle: setup ## methods over the stages of configs/lifecycle-tiny.yaml, three seeds each; long, and goes on when stopped
	$(BIN)/python -m benchmarks.lifecycle

.PHONY: soak-lifecycle
soak-lifecycle: setup ## configs/lifecycle-tiny.yaml killed at random times, against one that is not; some 25 minutes
	$(BIN)/python -m benchmarks.lifecycle.kills

.PHONY: validate-small
validate-small: setup ## is the simulation true? Real runs beside a pretraining and a midtraining search, tiny, on two cores
	$(BIN)/python -m benchmarks.validate_small

.PHONY: bench-data
bench-data: setup ## loaders and ingest beside what others use; some 25 minutes on free cores
	$(BIN)/python -m benchmarks.loader --out benchmarks/results/loader.md
	$(BIN)/python -m benchmarks.ingest

.PHONY: bench-kernels
bench-kernels: ## kernels beside their baselines on a CUDA machine, some 10 minutes; uses .venv, or PYTHON if there is none
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_kernels.py --out benchmarks/results

.PHONY: bench-engines
bench-engines: ## engines beside a loop by hand and HF's Trainer, searches in jobs, on a CUDA machine; what has no number yet, 9 minutes a call
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_engines.py --missing --out benchmarks/results

.PHONY: soak
soak: setup ## faults on purpose in real jobs, at least 110 of them; some 60 minutes on free cores, and goes on when stopped
	$(BIN)/python -m benchmarks.soak

.PHONY: lock
lock: ## write the locks again (needs uv); pins stay where they can: delete the locks for the newest
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	  --override requirements/left-out.txt --output-file requirements/cuda.lock \
	  setup.py requirements/base.in requirements/dev.in
	sed -E -e '/^(cuda|nvidia)[-=]/d' -e 's/^torch==[^ ]+/&+cpu/' requirements/cuda.lock > requirements/cpu.lock

.PHONY: clean
clean: ## remove the environment, caches and build folders; data/ and runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
