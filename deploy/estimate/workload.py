"""What a run has to do: ticks, samples, tokens and fires of a config. No torch."""

from __future__ import annotations

import numpy as np

from anchor_service.config import correction_payload
from anchor_service.lag import Due, agenda
from codec.schedule import q_should_refresh
from swarm.run_config import RunConfig


def agreed_on(config: RunConfig) -> bool:
    """Whether all ranks speak once before they sum: of corrections that they hold, and of numbers that are not finite."""
    return config.swarm.on_nan == "skip" or correction_payload(config.anchor, config.merger) is not None


def samples_per_tick(config: RunConfig) -> int:
    return config.grpo.ppo_mini_batch_size * config.grpo.group_size


def prompt_tokens(config: RunConfig) -> float:
    """Mean prompt length that `links` assumes."""
    return config.links.prompt_tokens or config.grpo.max_prompt_length / 2


def response_tokens(config: RunConfig) -> float:
    """Mean response length that `links` assumes."""
    return config.links.response_tokens or config.grpo.max_response_length / 2


def tokens_per_tick(config: RunConfig) -> float:
    """Real tokens, prompts and responses, that all replicas together pass through the model once a tick."""
    return samples_per_tick(config) * (prompt_tokens(config) + response_tokens(config))


def expected_fires(config: RunConfig, ticks: int) -> list[Due]:
    """Lockstep: the agenda. Wall clock: about what comes of workers that need delay_k ticks for each fire."""
    anchor = config.anchor
    if correction_payload(config.anchor, config.merger) is None:
        return []
    if anchor.clock == "lockstep":
        return agenda(anchor, config.run.seed, ticks)
    return [Due(i, s, s + anchor.delay_k) for i, s in enumerate(evenly(anchor.workers / anchor.delay_k, ticks), 1)]


def evenly(rate: float, ticks: int) -> list[int]:
    """About `rate` of the first `ticks` ticks, at most each of them."""
    return np.unique(np.arange(0, ticks, max(1.0, 1 / rate)).astype(int)).tolist() if rate else []


def fires_per_tick(config: RunConfig, ticks: int | None = None) -> float:
    ticks = ticks or config.ticks
    return len(expected_fires(config, ticks)) / ticks


def merging_share(config: RunConfig, ticks: int) -> float:
    """Share of the ticks that hold a correction."""
    firsts = [due.first_tick for due in expected_fires(config, ticks) if due.first_tick and due.first_tick <= ticks]
    return (ticks + 1 - min(firsts)) / ticks if firsts else 0.0


def engine_nodes(config: RunConfig) -> int:
    """Copies of the engines' weights that cross a link, as `links` assumes."""
    return min(config.links.engine_nodes or config.rollout.replicas, config.rollout.replicas)


def replica_nodes(config: RunConfig) -> int:
    """Copies of a stage's correction that cross a link, as `links` assumes."""
    return min(config.links.replica_nodes or config.swarm.dp, config.swarm.dp)


def microbatch_count(config: RunConfig) -> int:
    """Microbatches of one replica in a tick."""
    return -(-(samples_per_tick(config) // config.swarm.dp) // config.swarm.micro_batch_size)


def recomputed(config: RunConfig, first: int, tables: bool) -> int:
    """Mini-batches of the step that begins with tick `first` whose old log-probs take a pass of their own.

    `tables`: whether the codec has any that are refreshed.
    """
    refreshed = tables and q_should_refresh(first, config.q_cadence)
    return sum(config.grpo.recomputes(i, refreshed) for i in range(config.grpo.ticks_per_step))


def forward_passes(config: RunConfig, tables: bool, ticks: int | None = None) -> float:
    """In a mean tick of the first `ticks` (default: all): its own, and that for old log-probs where there is one."""
    ticks, each = ticks or config.ticks, config.grpo.ticks_per_step
    return 1 + sum(recomputed(config, first, tables) for first in range(1, ticks + 1, each)) / ticks


def refresh_share(config: RunConfig, ticks: int | None = None) -> float:
    """Share of the first `ticks` ticks (default: all) that refresh Q."""
    ticks = ticks or config.ticks
    return sum(q_should_refresh(t, config.q_cadence) for t in range(1, ticks + 1)) / ticks
