"""Config of the swarm. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from codec.config import NODE_TAG, CodecConfig, Reading, Section, When
from rl.config import ModelConfig


class SwarmConfig(Section):
    """The grid of workers: `dp` replicas of a pipeline of `pp` stages."""

    dp: int = Field(default=1, ge=1, description="data-parallel replicas")
    pp: int = Field(default=1, ge=1, description="pipeline stages; boundaries inside a stage are virtual")
    boundaries: list[int] = Field(
        default_factory=list, description="cut the decoder in front of these layers; len+1 is a multiple of pp"
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="cuda: nccl groups and one GPU a worker; cpu: gloo"
    )
    placement: Literal["pack", "replicas"] = Field(
        default="pack",
        description="`pack`: on as few nodes as hold it; `replicas`: a replica's stages on one node, replicas apart",
    )
    resource: str | None = Field(
        default=None,
        pattern=NODE_TAG,
        description="custom Ray resource of the nodes that workers must be on, e.g. `swarm`; default: any node",
    )
    micro_batch_size: int = Field(default=32, ge=1, description="samples in one microbatch of a worker")
    share_prompts: bool | None = Field(
        default=None,
        description="what samples of a microbatch have in common is computed once, and a prompt's samples are kept together; "
        "anchor likewise; needs model.attention=sdpa; default: on where copies of a row come out of the codec alike, but for "
        "`builtin:` models, whose published bits are plain",
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep a layer's input alone and compute it again in the backward; anchor likewise"
    )
    threads: int = Field(
        default=1,
        ge=1,
        description="torch threads of each process; they wait for each other by spinning, so where other processes are busy on the "
        "same cores set OMP_WAIT_POLICY=passive in the environment",
    )
    check_every: int = Field(
        default=1, ge=0, description="compare the replicas' weight digests every so many ticks; 0: never"
    )
    on_nan: Literal["stop", "skip"] = Field(
        default="skip",
        description="a NaN or an infinity in a tick's samples, passes, loss or gradient, or in a correction: `skip`: all ranks "
        "leave that tick or that correction out, and the fifth such tick in a row stops the run; `stop`: the first does",
    )
    timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="deadline of every exchange between workers, and of whatever they are asked for: a tick, the start of "
        "a step, weights, a checkpoint; a tick in which a correction is due may take `anchor.timeout_s` longer",
    )
    start_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="deadline for room in the cluster, and then for actors to start and load the model",
    )

    def shares_prompts(self, model: ModelConfig, codec: CodecConfig) -> bool:
        """Whether rows that samples have in common are computed once."""
        if self.share_prompts is not None:
            return self.share_prompts
        return not model.path.startswith("builtin:") and not self.unshared(model, codec)

    def unshared(self, model: ModelConfig, codec: CodecConfig) -> str:
        """Why a model that is not built in does not share them by default; "" if it does, or something is set."""
        if self.share_prompts is not None or model.path.startswith("builtin:"):
            return ""
        if model.attention != "sdpa":
            return f"model.attention is {model.attention!r}, sdpa alone can"
        anew = self.boundaries and not codec.codes_copies_alike
        return f"codec.kind {codec.kind!r} codes each copy of a row anew, prefixes not shared" if anew else ""

    def name_of(self, rank: int) -> str:
        """What messages call a worker: its replica and its stage."""
        d, p = divmod(rank, self.pp)
        return f"worker d{d}p{p}"

    @model_validator(mode="after")
    def _cuts(self) -> SwarmConfig:
        if self.boundaries != sorted(set(self.boundaries)) or any(b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries {self.boundaries} must be increasing layer numbers from 1 on")
        segments = len(self.boundaries) + 1
        if segments % self.pp:
            raise ValueError(
                f"{len(self.boundaries)} boundaries make {segments} segments, which {self.pp} stages (pp) cannot "
                f"share evenly: give {self.pp - 1} boundaries, or a multiple of pp minus one"
            )
        return self


class SamplesConfig(Section):
    """Which answers of the policy are kept to be read: `samples.jsonl` in the run's folder, and its report."""

    prompts: int = Field(
        default=2,
        ge=0,
        description="the first so many prompts of each step, with all their answers; 0: validation alone",
    )
    max_mb: float = Field(
        default=16.0,
        ge=0,
        description="size of the file in MB; when it is full, steps between the first and the last go, evenly; 0: "
        "nothing is kept, and engines tell the rewards and lengths alone of validation",
    )

    @property
    def kept(self) -> bool:
        return self.max_mb > 0


class DiagnosticsConfig(Section):
    """What a correction is worth, measured in the run: dense gradients beside those that the swarm used."""

    every: int | None = Field(
        default=None,
        ge=1,
        description="diagnose every so many ticks, on an actor of its own with `anchor.device` and "
        "`anchor.micro_batch_size`; the weights stay the same to the bit; default: never",
    )


class FaultsConfig(Section):
    """Which failures of its processes a run deals with, and how often."""

    budget: int = Field(
        default=1000, ge=0, description="failures that a run deals with before it ends; 0: the first one ends it"
    )
    a_tick: int = Field(default=3, ge=1, description="failures of one role within one tick that it deals with")
    spares: int = Field(
        default=0,
        ge=0,
        description="workers beside those that train, each a process of about 300 MB and with `swarm.device` cuda a GPU: one "
        "takes the place of a worker that is lost, while another starts in the background",
    )
    spare_s: float | None = Field(
        default=None,
        gt=0,
        description="so long is waited for a process in the place of a lost worker; then a replica less goes on, until "
        "there is one; default: 60 in lockstep, where fewer replicas change the bits; on the wall clock 0.5 where two "
        "replicas or more are left that can share its samples evenly, else 60",
    )
    grace_s: float = Field(
        default=20.0,
        ge=0,
        description="on a cluster that is there (`--address`) a run that gets SIGTERM may take so long to end its step, and "
        "write a checkpoint if it keeps any; 0: it ends at once",
    )
    slow_factor: float = Field(
        default=2.0,
        gt=1,
        description="what takes this many times as long as usual (the median of the last 20 of its kind, from the third on) "
        "is looked into: an event names who keeps the others waiting",
    )
    slow_floor_s: float = Field(default=1.0, gt=0, description="nothing is looked into earlier")
    hang_factor: float = Field(
        default=20.0,
        gt=1,
        description="what takes this many times as long as usual hangs: stacks are written into the run's folder, and who "
        "keeps the others waiting has failed; never later than `swarm.timeout_s`, `rollout.timeout_s`, `anchor.timeout_s`",
    )
    hang_floor_s: float = Field(default=60.0, gt=0, description="nothing hangs earlier")


class LinksConfig(Section):
    """What `plan` and `simulate` assume of the cluster; a run itself never reads this."""

    swarm_mbit: float = Field(default=100.0, gt=0, description="bandwidth between two workers, Mbit/s each way")
    swarm_latency_ms: float = Field(default=20.0, ge=0, description="one-way latency between two workers")
    anchor_mbit: float = Field(
        default=100.0, gt=0, description="bandwidth between the swarm and an anchor worker or engine, Mbit/s"
    )
    anchor_latency_ms: float = Field(default=50.0, ge=0, description="one-way latency to the anchor or an engine")
    engine_nodes: int = Field(
        default=0, ge=0, description="nodes that the engines are on, a copy of the weights for each; 0: one each"
    )
    replica_nodes: int = Field(
        default=0, ge=0, description="nodes that the replicas of a stage are on, a correction for each; 0: one each"
    )
    jitter: float = Field(default=0.1, ge=0, le=2, description="standard deviation of a transfer's logarithm")
    worker_tokens_s: float = Field(
        default=2000.0, gt=0, description="tokens/s of one worker through the whole model, forward+backward"
    )
    anchor_tokens_s: float = Field(default=2000.0, gt=0, description="tokens/s of one anchor worker, forward+backward")
    engine_tokens_s: float = Field(default=2000.0, gt=0, description="sampled tokens/s of one engine")
    response_tokens: float = Field(
        default=0.0, ge=0, description="mean response length assumed; 0: half of grpo.max_response_length"
    )
    prompt_tokens: float = Field(
        default=0.0, ge=0, description="mean prompt length assumed; 0: half of grpo.max_prompt_length"
    )
    blank_ticks: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of ticks assumed to have no gradient, because no group has an advantage",
    )


READING: Reading = {"samples.prompts": ((When("samples.max_mb", (16.0,), lambda mb: mb > 0),),)}
