"""The whole config of a run, composed from each package's section, and checked as a whole.

No torch, no Ray. What a check needs of the model is read from the model's own metadata.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field, field_validator, model_validator

from anchor_service.config import AnchorConfig, correction_payload
from anchor_service.lag import read_trace
from codec.config import CodecConfig, Section
from merger import MERGERS
from merger.config import MergerConfig
from rl.config import LEAST_TEMPERATURE, GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, ValConfig
from rl.model_files import model_shape
from rl.model_shape import ModelShape
from rl.problem_columns import metric_name
from rl.task_config import TaskConfig
from rl.tasks import check_set, check_task
from rl.val_config import task_of
from swarm.config import DiagnosticsConfig, FaultsConfig, LinksConfig, SamplesConfig, SwarmConfig


class RunSection(Section):
    """The run itself."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9._-]+$", description="name of the run; its folder is named after it"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seeds prompts, sampling and the first Q")
    steps: int = Field(default=75, ge=1, description="global steps")
    checkpoint_every: int = Field(default=0, ge=0, description="checkpoint every so many steps; 0: never")
    loggers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="beside metrics.jsonl and TensorBoard; one that fails does not stop the run"
    )

    @field_validator("loggers")
    @classmethod
    def _loggers_are_installed(cls, names: list[str]) -> list[str]:
        for name in names:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a mere folder of that name, as wandb leaves behind, is none
                raise ValueError(f"{name!r} is not installed: pip install 'northstar[{name}]', or leave it out")
        return names


class RunConfig(Section):
    """All sections. `resolved()` gives the TOML that runs the same again."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    grpo: GrpoConfig = GrpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    swarm: SwarmConfig = SwarmConfig()
    codec: CodecConfig = CodecConfig()
    anchor: AnchorConfig = AnchorConfig()
    merger: MergerConfig = MergerConfig()
    val: ValConfig = ValConfig()
    samples: SamplesConfig = SamplesConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    faults: FaultsConfig = FaultsConfig()
    links: LinksConfig = LinksConfig()

    @property
    def q_cadence(self) -> int:
        """Q is refreshed with M unless told otherwise."""
        return self.codec.q_cadence or self.anchor.cadence

    @property
    def shares_prompts(self) -> bool:
        """Whether rows that samples have in common are computed once."""
        return self.swarm.shares_prompts(self.model, self.codec)

    @property
    def ticks(self) -> int:
        """Of the whole run."""
        return self.run.steps * self.grpo.ticks_per_step

    def validates_after(self, step: int) -> bool:
        return step % self.val.every == 0 or step == self.run.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows."""
        every = self.run.checkpoint_every
        return every > 0 and (step % every == 0 or step == self.run.steps)

    def exact_after(self, step: int) -> bool:
        """Whether the engines get the weights as they are, also where `snapshot.rate` codes them."""
        return self.validates_after(step) or self.saves_after(step)

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        self._check_placebo()
        if self.merger.kind != "none" and not self.anchor.enabled and not self.merger.placebo:
            raise ValueError(
                f"merger.kind {self.merger.kind!r} needs the anchor: set anchor.enabled=true or merger.kind=none"
            )
        samples = self.grpo.ppo_mini_batch_size * self.grpo.group_size
        if samples % self.swarm.dp:
            raise ValueError(
                f"swarm.dp {self.swarm.dp} does not divide the {samples} samples of a tick "
                f"(grpo.ppo_mini_batch_size x grpo.group_size)"
            )
        if self.merger.kind in MERGERS:  # one of the user's own is looked at where it merges
            correction_payload(self.anchor, self.merger)
        self._check_shared_weights()
        self._check_staleness()
        self._check_validation()
        self._check_warmup()
        self._check_filter()
        self._check_placement()
        self._check_attention()
        if self.anchor.lag.kind == "trace":
            read_trace(self.anchor.lag.path)
        check_task(self.task)
        if self.task.reward_patience_s >= self.rollout.timeout_s:
            raise ValueError(
                f"task.reward_timeout_s {self.task.reward_timeout_s:g} times task.reward_failures "
                f"{self.task.reward_failures} must be below rollout.timeout_s {self.rollout.timeout_s:g}, the deadline of a "
                f"whole batch: else a reward that hangs looks like an engine"
            )
        try:
            shape = model_shape(self.model.path)
        except ValueError as error:
            raise ValueError(f"model.path: {error}") from None
        if shape is not None:  # else a hub id that is not on this machine: checked once it is there
            self.check_fits(shape)
        return self

    def _check_placebo(self) -> None:
        """A placebo replaces the anchor, and follows the schedule that the clock of ticks gives it."""
        if not self.merger.placebo:
            return
        if self.anchor.enabled:
            raise ValueError(
                f"merger.placebo {self.merger.placebo!r} stands in for the anchor: set anchor.enabled=false"
            )
        if self.anchor.clock != "lockstep" or self.anchor.lag.kind != "fixed":
            raise ValueError(
                "merger.placebo needs anchor.clock=lockstep and anchor.lag.kind=fixed: it has no lag of its own"
            )

    def _check_attention(self) -> None:
        """Flash attention is for 16-bit numbers on GPUs; whether it is installed is seen where the model is built."""
        attention = self.model.attention
        if self.swarm.share_prompts and attention != "sdpa":
            raise ValueError(
                f"swarm.share_prompts is for model.attention=sdpa, it is {attention!r}: set model.attention=sdpa or "
                f"swarm.share_prompts=false"
            )
        if not attention.startswith("flash"):
            return
        if self.model.dtype != "bfloat16":
            raise ValueError(f"model.attention {attention!r} computes in 16 bits: set model.dtype=bfloat16")
        devices = {"swarm.device": self.swarm.device, "rollout.device": self.rollout.device}
        devices |= {"anchor.device": self.anchor.device} if self.anchor.enabled else {}
        for key, device in devices.items():
            if device != "cuda":
                raise ValueError(f"model.attention {attention!r} needs {key}=cuda, it is {device!r}: or use sdpa")

    def _check_shared_weights(self) -> None:
        """The engines get weights at the end of a step: a fixed lag must take its snapshots there."""
        anchor, ticks = self.anchor, self.grpo.ticks_per_step
        if not (anchor.enabled and anchor.weights == "shared" and anchor.clock == "lockstep"):
            return
        if anchor.lag.kind != "fixed" or anchor.cadence % ticks or anchor.delay_k % ticks:
            raise ValueError(
                f"anchor.weights 'shared' in lockstep needs a fixed lag, with anchor.delay_k {anchor.delay_k} and "
                f"anchor.cadence {anchor.cadence} multiples of the {ticks} ticks of a step: the engines get no other weights"
            )

    def _check_staleness(self) -> None:
        """Samples of older weights are off-policy: something must weigh them by the policy that drew them."""
        stale, grpo = self.rollout.max_staleness, self.grpo
        if stale and grpo.rollout_is == "none" and grpo.old_logprobs != "rollout":
            raise ValueError(
                f"rollout.max_staleness {stale} trains on samples of older weights, and with grpo.rollout_is 'none' and "
                f"grpo.old_logprobs {grpo.old_logprobs!r} nothing corrects for that: set grpo.rollout_is=token "
                f"(truncated importance weights), or grpo.old_logprobs=rollout (ratio to the engine's log-probs)"
            )

    def _check_validation(self) -> None:
        """Greedy answers to one prompt are the same; and two sets under one name would be one line of a plot."""
        own = metric_name(self.task.name)
        for one in self.val.asked(self.rollout.validation_temperature).values():
            warm = f"{one.key}.temperature" if one.name else "rollout.val_temperature"
            if one.samples > 1 and one.temperature == 0:
                raise ValueError(
                    f"{one.key}.samples {one.samples} greedy answers to a prompt are one: set {warm} above 0, or "
                    f"{one.key}.samples=1"
                )
            if 0 < one.temperature < LEAST_TEMPERATURE:
                raise ValueError(f"{warm} {one.temperature:g} must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
            if one.name == own:
                raise ValueError(f"{one.key}: metrics of the task itself have the name {own!r}: choose another")
        for name, one in self.val.sets.items():
            if one.task is not None:
                check_set(task_of(self.task, one), f"val.sets.{name}")
            elif one.params:
                raise ValueError(
                    f"val.sets.{name}.params are read with a val.sets.{name}.task: set it, or leave them out"
                )

    def _check_filter(self) -> None:
        """What is sampled again is of the weights that the step begins with, and so must the rest be."""
        most, stale = self.grpo.filter_groups.max_num_gen_batches, self.rollout.max_staleness
        if most > 1 and stale:
            raise ValueError(
                f"grpo.filter_groups.max_num_gen_batches {most} samples again while a step waits, and with "
                f"rollout.max_staleness {stale} nobody waits: set one of them to its default"
            )

    def _check_warmup(self) -> None:
        """A rate that never gets to where it should is a mistake."""
        warmup = self.grpo.lr_schedule.warmup_ticks
        if warmup > self.ticks:
            raise ValueError(
                f"grpo.lr_schedule.warmup_ticks {warmup} is more than the {self.ticks} ticks of {self.run.steps} steps: "
                f"lower it, or raise run.steps"
            )

    def _check_placement(self) -> None:
        """Who is colocated sits on the GPUs of the first workers."""
        workers = self.swarm.dp * self.swarm.pp
        asked = (
            ("rollout", self.rollout.placement, "engines", "rollout.replicas", self.rollout.replicas),
            ("anchor", self.anchor.placement, "anchor workers", "anchor.workers", self.anchor.workers),
        )
        for section, placement, who, key, n in asked:
            if placement == "colocated" and (self.swarm.device != "cuda" or n > workers):
                raise ValueError(
                    f"{section}.placement 'colocated' puts {n} {who} on the GPUs of {workers} workers with "
                    f"swarm.device {self.swarm.device!r}: set swarm.device=cuda and {key} to at most {workers}"
                )

    def check_fits(self, shape: ModelShape) -> None:
        """Raises ValueError where the config does not fit a model of this shape."""
        length = self.grpo.max_prompt_length + self.grpo.max_response_length
        for limit in shape.too_long(length):
            raise ValueError(
                f"grpo.max_prompt_length + grpo.max_response_length is {length}, beyond {limit}: lower one of them"
            )
        if self.task.chat and not shape.chat:
            raise ValueError(
                f"task.chat: the tokenizer of {self.model.path!r} has no chat template: set task.chat=false, use the "
                f"instruction-tuned model, or put a chat_template.jinja into its folder"
            )
        for boundary in self.swarm.boundaries:
            if boundary >= shape.layers:
                raise ValueError(
                    f"swarm.boundaries: {boundary} is outside the model, which has {shape.layers} layers "
                    f"(allowed: 1 to {shape.layers - 1})"
                )
        try:
            self.codec.check_hidden(shape.hidden)
        except ValueError as error:
            raise ValueError(f"codec.rank: {error}") from None
