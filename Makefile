# Two commands for a newcomer: `make simulate` and `make test`. Both make .venv from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

# The folders of `make test-fast`: what starts no process and trains no federation. A new folder of
# such tests is added here.
FAST := tests/test_layout.py tests/test_branches.py tests/test_random_numbers.py \
	tests/test_architecture.py tests/common/config tests/common/federation tests/common/messages \
	tests/common/modalities tests/common/privacy tests/common/secagg tests/client/policy \
	tests/client/secagg tests/server/jobs tests/server/monitoring

.PHONY: simulate test-fast test test-all lint backbone rpc clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and by name: any later range is then satisfied by this build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

simulate: .venv/ready
	$(BIN)/fedgraft simulate

test-fast: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(FAST)

test: .venv/ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-all: .venv/ready lint
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,simulation,quantize]"
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m ""

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Draws the source glyphs and trains the built-in backbone again, byte for byte.
backbone: .venv/ready
	$(BIN)/python -m fedgraft.simulations.demo.pretrain common/fedgraft/common/builtin/glyph-vit

# The code of the gRPC services from their description.
rpc: .venv/ready
	$(BIN)/python -m grpc_tools.protoc -I common --python_out=common --pyi_out=common \
		--grpc_python_out=common common/fedgraft/common/rpc/fedgraft_v1.proto

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist build
