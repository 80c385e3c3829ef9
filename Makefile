# demo: the whole loop on the embedded default   test: everything that .ci/run checks   smoke: two minutes
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
# The oracles' torch: python3.11 where it runs, else the one above
ORACLE_BASE ?= $(shell python3.11 -c 'import ensurepip' 2>/dev/null && echo python3.11 || echo $(PYTHON))

# sglang-jax wants 3.12 or later; pyenv hides what it has not been told to use
LATE_BASE ?= $(shell for python in python3.12 python3.13 $$HOME/.pyenv/versions/3.1[23].*/bin/python; do \
  $$python -c 'import ensurepip' 2>/dev/null && echo $$python && break; done)

VENV ?= .venv
ORACLE_VENV ?= .venv-oracle
CONFORMANCE_VENVS ?= .venv-conformance
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
export ORACLE_PYTHON ?= $(abspath $(ORACLE_VENV))/bin/python
override CONFORMANCE_VENVS := $(abspath $(CONFORMANCE_VENVS))
export CONFORMANCE_VENVS

.DELETE_ON_ERROR:
.PHONY: demo test test-fast test-slow conformance parity peer draft-peer train-peer attack soak latencies tpu-check lint smoke env test-env oracle-env conformance-env clean

demo: env
	$(BIN)/python -m pipeline stage=all
	$(BIN)/python -m pipeline stage=ask

# build/outcomes.json says what each test cost: $(BIN)/python -m tests.support.timing build/outcomes.json
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8

test: lint oracle-env
	$(PYTEST) --outcomes build/outcomes.json

test-fast: test-env # while developing: no other programs, buckets or hosts; what was compiled before is read from build/
	JAX_COMPILATION_CACHE_DIR=$(abspath build/compiled) $(PYTEST) \
	  -m "not gpu and not slow and not conformance and not multihost and not buckets"

test-slow: demo test-env oracle-env conformance-env # weekly and before a release
	$(PYTEST) -m "slow and not gpu" --outcomes build/outcomes_slow.json

conformance: demo test-env oracle-env conformance-env # other programs: readers of exported drafts, clients of the server, a browser
	$(BIN)/python -m pytest -m conformance tests/conformance tests/export

draft-peer: env oracle-env # after demo: DFLASH decoding beside the published package's dflash_generate
	$(BIN)/python -m pipeline stage=peer peer.draft=true peer.num_prompts=16 'peer.command=[$(ORACLE_PYTHON),tests/oracles/dflash_speed.py]' $(ARGS)

peer: env oracle-env # plain decoding beside transformers' generate; another target: make peer ARGS=experiment=smollm2
	$(BIN)/python -m pipeline stage=target $(ARGS)
	$(BIN)/python -m pipeline stage=peer 'peer.command=[$(ORACLE_PYTHON),tests/oracles/gpt_oss_speed.py]' $(ARGS)

train-peer: env oracle-env # a training step beside speculators'; what the drafts are worth: ARGS=train_peer.quality_steps=1300
	$(BIN)/python -m pipeline stage=target $(ARGS)
	$(BIN)/python -m pipeline stage=teacher_cache $(ARGS)
	$(BIN)/python -m pipeline stage=train_peer 'train_peer.command=[$(ORACLE_PYTHON),tests/oracles/speculators_train.py]' $(ARGS)

parity: test-env oracle-env # after demo: its own target and draft against the oracles
	$(BIN)/python -m pytest -m slow tests/test_demo_parity.py

attack: demo test-env # half-open connections, large bodies and the like beside good clients; ATTACK=300 seconds
	$(BIN)/python -m tests.attack --seconds $(or $(ATTACK),60)

soak: demo test-env # two minutes of 256 requests at a time, a third broken off; again with pages for 40 of them
	$(BIN)/python -m tests.soak

tpu-check: test-env # on the first TPU slice; ENGINE_PYTHON=the interpreter of sglang-jax's environment, ARGS=overrides
	$(BIN)/python -m tests.tpu_check --engine-python $(ENGINE_PYTHON) $(ARGS)

latencies: demo test-env # second turns, shared prompts, streams beside a long prompt, a draft that knows nothing
	$(BIN)/python -m tests.latencies

lint: test-env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m tests.support.word_check

smoke: env
	$(BIN)/python -m pipeline stage=smoke

env: $(VENV)/.installed
test-env: $(VENV)/.installed-test
# an interpreter given as ORACLE_PYTHON is taken as it is
oracle-env: $(if $(filter $(abspath $(ORACLE_VENV))/%,$(ORACLE_PYTHON)),$(ORACLE_VENV)/.installed-harmony)

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or: make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install $(PIP_FLAGS) uv==0.13.9
	@touch $@

# uv takes seconds where pip takes minutes; pip does it where uv cannot (an index that only pip is configured for)
define install
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '$(1)' || \
	  $(BIN)/python -m pip install $(PIP_FLAGS) --constraint requirements.lock --editable '$(1)'
endef

$(VENV)/.installed: $(VENV)/.created pyproject.toml requirements.lock
	@echo "installing the pinned dependencies into $(VENV) (about 2 GB, once)"
	$(call install,.)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(call install,.[test])
	@touch $@

# torch first and alone, so that nothing else chooses its build; the last ones without their dependencies, which
# want another; accelerate is what transformers unpacks MXFP4 with, scipy and what follows it what modelopt imports
ORACLE_PIP := $(ORACLE_VENV)/bin/python -m pip install $(PIP_FLAGS)

$(ORACLE_VENV)/.installed:
	@test -n "$(ORACLE_BASE)" || { echo "error: no Python 3.11, 3.12 or 3.13 found for the oracles" >&2; exit 2; }
	@echo "installing the oracles (torch, transformers, dflash) into $(ORACLE_VENV), once"
	$(ORACLE_BASE) -m venv $(ORACLE_VENV)
	$(ORACLE_PIP) torch==2.13.0
	$(ORACLE_PIP) transformers==5.15.0 tokenizers==0.22.2 safetensors==0.8.0 numpy==2.4.6 jinja2==3.1.6 gguf==0.19.0
	$(ORACLE_PIP) accelerate==1.15.0 psutil==7.2.2 scipy==1.17.1 requests==2.34.2 omegaconf==2.4.0 pulp==3.3.2
	$(ORACLE_PIP) --no-deps dflash==0.1.0 nvidia-modelopt==0.47.0 specforge==0.2.0 speculators==0.9.0 hs-connectors==0.9.0 peft==0.21.2
	@touch $@

# the reference renderer of GPT-OSS's conversations, and the official tokenizer and template out of two wheels
$(ORACLE_VENV)/.installed-harmony: $(ORACLE_VENV)/.installed tests/oracles/harmony_assets.py
	$(ORACLE_PIP) openai-harmony==0.0.8 pydantic==2.14.4
	$(ORACLE_VENV)/bin/python -m pip download $(PIP_FLAGS) --no-deps --only-binary :all: --dest $(ORACLE_VENV)/wheels \
	  llama-index-core==0.14.25 trl==1.16.0
	$(ORACLE_VENV)/bin/python tests/oracles/harmony_assets.py --wheels $(ORACLE_VENV)/wheels --assets $(ORACLE_VENV)/assets
	rm -rf $(ORACLE_VENV)/wheels
	@touch $@

# one environment for each program that opens drafts or asks a server, with as much as it imports; 3 GB in all
CONFORMANCE := transformers4 transformers5 sglang_jax sglang_server speculators llama_cpp clients browser bench_tools postgres
conformance-env: $(CONFORMANCE:%=$(CONFORMANCE_VENVS)/%/.installed)

$(CONFORMANCE_VENVS)/%/.created:
	@test -n "$(LATE_BASE)" || { echo "error: sglang-jax needs Python 3.12 or 3.13; give it: make LATE_BASE=/path/to/python" >&2; exit 2; }
	$(if $(filter sglang_jax sglang_server clients browser bench_tools,$*),$(LATE_BASE),$(ORACLE_BASE)) -m venv $(@D)
	@touch $@

.PRECIOUS: $(CONFORMANCE_VENVS)/%/.created
IN_VENV = $(@D)/bin/python -m pip install $(PIP_FLAGS)

$(CONFORMANCE_VENVS)/postgres/.installed: $(CONFORMANCE_VENVS)/postgres/.created
	$(IN_VENV) --no-deps pg8000==1.31.6 scramp==1.5.0 asn1crypto==1.5.1
	@touch $@

$(CONFORMANCE_VENVS)/transformers4/.installed: $(CONFORMANCE_VENVS)/transformers4/.created
	$(IN_VENV) torch==2.13.0
	$(IN_VENV) transformers==4.57.6
	@touch $@

$(CONFORMANCE_VENVS)/transformers5/.installed: $(CONFORMANCE_VENVS)/transformers5/.created
	$(IN_VENV) transformers==5.24.0
	@touch $@

# without the 4 GB that its server and other models want
$(CONFORMANCE_VENVS)/sglang_jax/.installed: $(CONFORMANCE_VENVS)/sglang_jax/.created
	$(IN_VENV) 'jax[cpu]==0.10.2' flax==0.12.4 transformers==4.57.6 huggingface-hub==0.34.6 safetensors==0.6.2 numpy==2.2.6
	$(IN_VENV) fastapi==0.165.0 orjson==3.13.0 partial-json-parser==0.2.1.1.post7 psutil==7.2.2 pyzmq==27.3.0 requests==2.34.2
	$(IN_VENV) --no-deps sglang-jax==0.1.0rc0
	@touch $@

# its whole server, with this project's GPT-OSS, and a TPU's compiler: 2 GB
$(CONFORMANCE_VENVS)/sglang_server/.installed: $(CONFORMANCE_VENVS)/sglang_server/.created external/sglang_jax/pyproject.toml
	$(IN_VENV) --editable './external/sglang_jax[cpu]' libtpu==0.0.42.1
	@touch $@

# benchmark tools of people; guidellm is none of them, for it needs torch
$(CONFORMANCE_VENVS)/bench_tools/.installed: $(CONFORMANCE_VENVS)/bench_tools/.created
	$(IN_VENV) 'lm-eval[api]==0.4.13' transformers==5.24.0 datasets==4.8.4 'evalscope[perf]==1.14.1' aiperf==0.13.0 schemathesis==4.32.5
	@touch $@

# drives the system's Chromium (Debian's package chromium), and downloads none
$(CONFORMANCE_VENVS)/browser/.installed: $(CONFORMANCE_VENVS)/browser/.created
	$(IN_VENV) playwright==1.65.2
	@touch $@

# llama.cpp, compiled, with Python's bindings
$(CONFORMANCE_VENVS)/llama_cpp/.installed: $(CONFORMANCE_VENVS)/llama_cpp/.created
	$(IN_VENV) xllamacpp==2026.10.11549
	@touch $@

# programs that speak OpenAI's API
$(CONFORMANCE_VENVS)/clients/.installed: $(CONFORMANCE_VENVS)/clients/.created
	$(IN_VENV) openai==3.3.0 openai-agents==0.24.0 litellm==1.110.2 langchain-openai==1.7.4 instructor==1.17.0
	@touch $@

# SpecForge beside it: its draft class alone, of which it pins another transformers
$(CONFORMANCE_VENVS)/speculators/.installed: $(CONFORMANCE_VENVS)/speculators/.created
	$(IN_VENV) torch==2.13.0
	$(IN_VENV) transformers==5.19.0 safetensors==0.8.0 datasets==5.1.0 hs-connectors==0.9.0 loguru==0.7.3
	$(IN_VENV) openai==3.57.0 pydantic==2.14.4 pydantic-settings==2.16.3
	$(IN_VENV) --no-deps speculators==0.9.0 specforge==0.2.0
	@touch $@

clean:
	rm -rf $(VENV) $(ORACLE_VENV) $(CONFORMANCE_VENVS) build .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
