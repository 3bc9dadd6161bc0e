# The README's two commands are `make demo` and `make test`; each does the set-up it needs.
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
TESTS ?= tests
JOBS ?= 3

.PHONY: help install demo smoke test operations faults conformance-vllm conformance-sglang lint format clean
help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with everything that requirements.lock names
$(VENV)/.installed: requirements.lock pyproject.toml deploy/install.sh
	@deploy/install.sh

demo: install ## start encoder, prefill, decode and proxy here, ask about two images, stay up until Ctrl-C
	@$(BIN)/python -m deploy.demo

smoke: install ## the same without staying up; fails unless the answer equals the reference model's
	@$(BIN)/python -m deploy.demo --smoke

test: install ## run the tests (TESTS=path for some of them, JOBS=1 one after the other)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

operations: install ## the tests against real parts: nginx, Envoy, Prometheus, Chromium; installs those from Debian
	@tests/operations/install.sh
	@TRIPTYCH_PARTS=required $(BIN)/python -m pytest tests/operations

faults: install ## engines killed and frozen in every phase, with two ranks each, embeddings in pieces and a shared store
	@TRIPTYCH_PARTS=required $(BIN)/python -m pytest tests/system/test_faults.py -k everything

conformance-vllm: install ## drive real vLLM engines, in an environment of their own, and print what passed
	@tests/conformance/vllm/install.sh .conformance/vllm
	@$(BIN)/python -m tests.conformance.vllm

conformance-sglang: install ## the same with real SGLang servers, 0.5.10 and 0.5.23
	@tests/conformance/sglang/install.sh .conformance/sglang
	@$(BIN)/python -m tests.conformance.sglang

lint: install ## ruff, mypy and the import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install ## rewrite the code as ruff would
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove .venv and everything else that make made
	@rm -rf $(VENV) .checkpoints .conformance build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
