"""Config of GRPO. No torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from codec.config import Reading, Section, When


class OverlongBuffer(Section):
    """Soft overlong punishment (DAPO): the reward falls over the last tokens before `grpo.max_response_length`."""

    length: int = Field(default=0, ge=0, description="tokens over which it falls (verl: overlong_buffer.len); 0 is off")
    penalty: float = Field(
        default=1.0,
        gt=0,
        description="what an answer of `grpo.max_response_length` tokens loses (verl: overlong_buffer.penalty_factor)",
    )


class FilterGroups(Section):
    """Dynamic sampling (DAPO): other prompts in the place of groups whose rewards are all the same."""

    max_num_gen_batches: int = Field(
        default=1,
        ge=1,
        description="batches of `train_batch_size` prompts that are sampled for a step at most; 1: no group is replaced. "
        "Groups that are still missing then are those of one reward. `plan` and `simulate` count 1",
    )


class LrSchedule(Section):
    """Learning rate by tick, that is by optimizer update: transformers' schedules."""

    kind: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="`linear` and `cosine` fall from `grpo.lr` over the ticks of the run"
    )
    warmup_ticks: int = Field(
        default=0, ge=0, description="ticks over which the rate rises, the first of which has a rate of 0"
    )
    min_ratio: float = Field(default=0.0, ge=0, lt=1, description="share of `grpo.lr` at which it would end")

    def factor(self, tick: int, ticks: int) -> float:
        """Share of `grpo.lr` in tick `tick`, from 1, of a run of `ticks`.

        As `get_constant_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
        `get_cosine_with_min_lr_schedule_with_warmup` of transformers/optimization.py have it after tick - 1 updates.
        """
        done = tick - 1
        if done < self.warmup_ticks:
            return done / self.warmup_ticks
        if self.kind == "constant":
            return 1.0
        left = max(0.0, (ticks - done) / max(1, ticks - self.warmup_ticks))
        fall = left if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return self.min_ratio + (1 - self.min_ratio) * fall


class GrpoConfig(Section):
    """One global step: train_batch_size prompts, group_size samples each, in mini-batches of one tick."""

    train_batch_size: int = Field(default=16, ge=1, description="prompts a global step")
    ppo_mini_batch_size: int = Field(default=8, ge=1, description="prompts a tick; divides train_batch_size")
    group_size: int = Field(default=8, ge=2, description="samples for each prompt (verl: rollout.n)")
    clip_ratio: float = Field(default=0.2, gt=0, lt=1, description="ratio is clipped to [1-c, 1+c]")
    clip_ratio_low: float | None = Field(
        default=None, gt=0, lt=1, description="l: ratio is clipped from below to 1-l; default: `clip_ratio`"
    )
    clip_ratio_high: float | None = Field(
        default=None, gt=0, description="h: ratio is clipped from above to 1+h (DAPO: 0.28); default: `clip_ratio`"
    )
    clip_ratio_c: float | None = Field(
        default=None,
        gt=1,
        description="dual clip: a token of negative advantage loses at most c times it; default: no bound",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        default="token",
        description="`sequence`: all tokens of a sample have the geometric mean of their ratios (GSPO), so clip ratios "
        "are 100 to 1000 times smaller; goes with `loss_agg_mode` seq-mean-token-mean",
    )
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        Field(
            default="token-mean",
            description="over a mini-batch: mean of all tokens; mean over samples of the mean of their tokens (GRPO); of their "
            "sum; of their sum over `max_response_length` (Dr. GRPO)",
        )
    )
    norm_adv_by_std: bool = Field(
        default=True, description="advantages are divided by the deviation of their group's rewards (Dr. GRPO: false)"
    )
    overlong_filter: bool = Field(
        default=False, description="answers that were cut are left out of the loss, not of their group's mean (DAPO)"
    )
    overlong_buffer: OverlongBuffer = OverlongBuffer()
    zero_variance: Literal["keep", "drop"] = Field(
        default="keep",
        description="`drop`: groups whose rewards are all the same are left out of what the loss is divided by",
    )
    filter_groups: FilterGroups = FilterGroups()
    lr: float = Field(default=1e-6, gt=0, le=1, description="Adam's learning rate, the highest of `lr_schedule`")
    lr_schedule: LrSchedule = LrSchedule()
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False, description="Adam's betas")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    grad_clip: float = Field(default=1.0, gt=0, description="largest global gradient norm over all stages")
    max_prompt_length: int = Field(
        default=64,
        ge=1,
        description="longest prompt in tokens, instruction and template included (but see task.overlong)",
    )
    max_response_length: int = Field(
        default=40, ge=1, description="longer answers are cut and score 0 (but see task.reward), in tokens"
    )
    old_logprobs: Literal["trainer", "tick", "rollout"] = Field(
        default="trainer",
        description="`trainer`: through the codec as it is at the start of a step; `tick`: as it is in the tick, for a "
        "step's first mini-batch; `rollout`: the engine's",
    )
    rollout_is: Literal["none", "token"] = Field(
        default="none",
        description="`token`: a token's policy loss is weighted by trainer's old probability over the engine's, truncated",
    )
    rollout_is_threshold: float = Field(default=2.0, ge=1, description="largest weight of `rollout_is`")
    kl_loss_coef: float = Field(default=0.0, ge=0, description="weight of the KL to the base policy; 0 is off")
    kl_loss_type: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="estimate of that KL, log p/q = x: `k1`: x, whose mean gradient is 0 on policy; `k2`: x²/2; `k3`: "
        "exp(-x)+x-1, bounded (verl: low_var_kl)",
    )
    kl_in_reward: float = Field(
        default=0.0,
        ge=0,
        description="weight of a sample's summed k1 to the base policy, taken off its reward before advantages; 0 is off",
    )
    entropy_coeff: float = Field(default=0.0, ge=0, description="weight of the entropy bonus; 0 is off")

    @model_validator(mode="after")
    def _whole_ticks(self) -> GrpoConfig:
        if self.train_batch_size % self.ppo_mini_batch_size:
            raise ValueError(
                f"train_batch_size {self.train_batch_size} is not a multiple of "
                f"ppo_mini_batch_size {self.ppo_mini_batch_size}: a step must be a whole number of ticks"
            )
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.rollout_is != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                "rollout_is weighs by the trainer's old log-probs over the engine's, and old_logprobs 'rollout' makes "
                "them the same: set old_logprobs=trainer or rollout_is=none"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> GrpoConfig:
        if self.overlong_buffer.length > self.max_response_length:
            raise ValueError(
                f"overlong_buffer.length {self.overlong_buffer.length} is more than max_response_length "
                f"{self.max_response_length}: set it to at most that"
            )
        most = self.filter_groups.max_num_gen_batches
        if self.kl_in_reward and (self.zero_variance == "drop" or most > 1):
            raise ValueError(
                f"zero_variance {self.zero_variance!r} and filter_groups.max_num_gen_batches {most} look for groups of one "
                f"reward, and with kl_in_reward {self.kl_in_reward:g} no two rewards are the same: set zero_variance=keep and "
                f"filter_groups.max_num_gen_batches=1, or kl_in_reward=0 (kl_loss_coef keeps the KL)"
            )
        return self

    @property
    def clip_range(self) -> tuple[float, float]:
        """What ratios are clipped to."""
        low = self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low
        high = self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
        return 1 - low, 1 + high

    @property
    def weighs_samples(self) -> bool:
        """Whether tokens of different samples weigh differently in the loss."""
        return self.loss_agg_mode != "token-mean" or self.overlong_filter or self.zero_variance == "drop"

    @property
    def counts_longest(self) -> bool:
        """Whether the objective depends on `max_response_length`, and not the answers alone."""
        return self.loss_agg_mode == "seq-mean-token-sum-norm" or self.overlong_buffer.length > 0

    @property
    def needs_reference(self) -> bool:
        """Whether engines hold the base policy."""
        return self.kl_loss_coef > 0 or self.kl_in_reward > 0

    @property
    def ticks_per_step(self) -> int:
        return self.train_batch_size // self.ppo_mini_batch_size

    def recomputes(self, mini_batch: int, refreshed: bool) -> bool:
        """Whether old log-probs of a step's mini-batch take a forward pass of their own.

        The first one's tick computes the same numbers itself, from the same weights, unless its codec is `refreshed`.
        """
        if self.old_logprobs == "rollout":
            return False
        return mini_batch > 0 or (refreshed and self.old_logprobs == "trainer")


READING: Reading = {
    "grpo.kl_loss_type": ((When("grpo.kl_loss_coef", (0.001,), lambda coef: coef > 0),),),
    "grpo.overlong_buffer.penalty": ((When("grpo.overlong_buffer.length", (8,), lambda length: length > 0),),),
    "grpo.lr_schedule.min_ratio": ((When("grpo.lr_schedule.kind", ("linear", "cosine")),),),
    "grpo.rollout_is_threshold": ((When("grpo.rollout_is", ("token",)),),),
}
