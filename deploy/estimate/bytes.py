"""Bytes of a config, by arithmetic: shared by `plan` and `simulate`. No Ray; torch for a `snapshot.rate` alone.

Every channel is counted as the code counts it when it runs (`codec/ledger.py`: a sender counts, a ring
all-reduce over n ranks is 2(n-1)/n of its bytes on each of them). What is approximate says so.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

from anchor_service.config import correction_payload
from codec.costs import FP32, BoundaryShape, CodecCost, Tokens, codec_cost, gradient_cost
from codec.ledger import CHANNELS
from deploy.estimate.batches import Sizes, answers, dealt, replay_bytes
from deploy.estimate.delta_size import Course, Walk, walk
from deploy.estimate.parameters import Group, Params, copy_groups, parameters, stage_parameters
from deploy.estimate.workload import (
    agreed_on,
    engine_nodes,
    evenly,
    expected_fires,
    forward_passes,
    merging_share,
    microbatch_count,
    prompt_tokens,
    refresh_share,
    replica_nodes,
    response_tokens,
    tokens_per_tick,
)
from merger import merger_class
from merger.look import stride_of
from rl.val_config import AskedSet
from swarm.run_config import RunConfig

# --- bytes of single messages --------------------------------------------------------------------


def cost_of_codec(config: RunConfig, hidden: int) -> CodecCost:
    """What this run's codec costs at one boundary. Raises ValueError for one that does not say it."""
    tokens = max(1.0, config.ticks * tokens_per_tick(config) / config.swarm.dp)
    sample = prompt_tokens(config) + response_tokens(config)
    return codec_cost(config.codec, BoundaryShape(hidden, config.model.itemsize), Tokens(tokens, sample))


def snapshot_bytes(config: RunConfig, params: Params, apart: float) -> float:
    """One exact snapshot, `apart` ticks after what its receiver holds; 0 ticks: the same weights, which cost nothing."""
    if full(config):
        return params.total * snapshot_itemsize(config)
    ticks = config.ticks
    return params.total * weights_walk(config, params, ticks).between(ticks - min(ticks, round(apart)), ticks)


def stream_bytes(config: RunConfig, params: Params, ticks: int, sent: list[int]) -> list[float]:
    """Each snapshot of an exact stream that sends the weights after the ticks `sent`, in a run of `ticks`.

    It begins with the weights of the model's files, for which nothing is sent.
    """
    if full(config):
        return [params.total * snapshot_itemsize(config)] * len(sent)
    found = weights_walk(config, params, ticks)
    return [params.total * found.between(a, b) for a, b in pairwise([0, *sent])]


def sync_bytes(config: RunConfig, params: Params, ticks: int) -> list[float]:
    """Each copy of the weights for the engines in a run of `ticks`: before the first step, then after every step."""
    each, rate = config.grpo.ticks_per_step, config.snapshot.rate
    sent = list(range(0, ticks + 1, each))
    if full(config) or rate is None:
        return stream_bytes(config, params, ticks, sent)
    exact = [step * each for step in range(len(sent)) if config.exact_after(step)]
    coded = weights_walk(config, params, ticks).coded(rate, tuple(sent), frozenset(exact))
    return [params.total * share for share in coded]


def full(config: RunConfig) -> bool:
    return config.snapshot.encoding == "full"


def snapshot_itemsize(config: RunConfig) -> int:
    return 2 if config.snapshot.is_bf16(config.model) else FP32


def weights_walk(config: RunConfig, params: Params, ticks: int) -> Walk:
    """How this run moves its weights."""
    course = Course(
        path=config.model.path,
        params=params,
        grpo=config.grpo,
        merger=config.merger,
        beta_anc=config.anchor.beta_anc,
        max_age=config.anchor.max_age,
        fires=tuple(expected_fires(config, ticks)),
        temperature=config.rollout.temperature,
        tokens=tokens_per_tick(config),
        blank=config.links.blank_ticks,
        bf16=config.snapshot.is_bf16(config.model),
        ticks=ticks,
    )
    return walk(course)


def correction_bytes(config: RunConfig, stages: list[int]) -> list[int]:
    """One correction for each of `stages` (their parameters), without headers of frames, its head with it.

    An upper bound: of one that would be merged with a share of 0 only the head is sent (`Merger.wants`). And for sign planes. Where M̄ is 0 they cost next to nothing: after batches without an advantage
    all of them. Nor do a large head's fill their bits: on few samples, rows of tokens that nobody expects repeat
    the signs of one hidden state (SmolLM2, 8 samples a tick: 3 to 12 % off the whole).
    """
    payload = correction_payload(config.anchor, config.merger)
    if payload is None:
        return [0 for _ in stages]
    whole = [FP32 * n if payload == "dense" else -(-n // 8) for n in stages]
    return [a + b for a, b in zip(whole, head_bytes(config, stages))]


def head_bytes(config: RunConfig, stages: list[int]) -> list[int]:
    """Of those, what a merger that looks is sent whatever it makes of it: signs of M at some coordinates."""
    stride = stride_of(sum(stages)) if merger_class(config.merger.kind).looks else 0
    return [-(-n // stride // 8) if stride else 0 for n in stages]


# --- bytes of a tick -----------------------------------------------------------------------------


def tick_bytes(
    config: RunConfig, ticks: int | None = None, fires: float | None = None, merges: float | None = None
) -> dict[str, tuple[float, float]]:
    """{channel: (sent, dense)} of all links together, for a mean tick of a run of `ticks` (default: the config's).

    `fires`: fires started per tick, `merges`: corrections that reached the ranks per tick; default
    those of `expected_fires` for both. Exact up to frame headers but for: token counts (assumed means), deltas
    (measured on a sample), sign planes that repeat themselves, and fires that an old trace never merged.
    """
    params = parameters(config)
    ticks = ticks or config.ticks
    sources = [due.source_tick for due in expected_fires(config, ticks)] if fires is None else evenly(fires, ticks)
    fires = len(sources) / ticks if fires is None else fires
    merges = fires if merges is None else merges
    syncs = (1 / config.grpo.ticks_per_step + 1 / ticks) * engine_nodes(config)

    found = (
        _boundaries(config, params.hidden, ticks)
        | _gradients(config, params)
        | {name: (sent, 0.0) for name, sent in anchor_channels(config, ticks, sources, merges).items()}
        | {
            "rollout_sync": (
                engine_nodes(config) * _syncs(config, params, ticks),
                syncs * config.model.itemsize * params.total,
            ),
            "control": _control_bytes(config, params, ticks, fires),
        }
    )
    return {channel: (float(found[channel][0]), float(found[channel][1])) for channel in CHANNELS}


def _gradients(config: RunConfig, params: Params) -> dict[str, tuple[float, float]]:
    """Sums over all who hold a copy: 2(n-1)/n of what is summed on each of n ranks."""

    def summed(groups: list[Group]) -> tuple[float, float]:
        sent = [2 * (n - 1) * gradient_cost(config.codec.gradient, shapes, n).sent for shapes, n in groups]
        return sum(sent), sum(2 * (n - 1) * FP32 * sum(map(prod, shapes)) for shapes, n in groups)

    own, tied = copy_groups(config, params)
    return {"grad_dp": summed(own), "tied": summed(tied)}


def _payload_sizes(config: RunConfig, params: Params) -> int:
    """Before every coded payload, to every other who holds a copy: chunks to their owners, and sums from them."""
    own, tied = copy_groups(config, params)
    coded = [(gradient_cost(config.codec.gradient, shapes, n).coded, n) for shapes, n in own + tied]
    return sum(count * 2 * 8 * n * (n - 1) for count, n in coded)


def _boundaries(config: RunConfig, hidden: int, ticks: int) -> dict[str, tuple[float, float]]:
    """Rows up and down, and what both ends must agree on."""
    swarm, each = config.swarm, cost_of_codec(config, hidden)
    crossed = tokens_per_tick(config) * len(swarm.boundaries)
    passes = forward_passes(config, each.ways > 0, ticks)
    dense = crossed * hidden * config.model.itemsize
    tables = each.ways * len(swarm.boundaries) * _table_rate(config, each, ticks)
    ring = 2 * (swarm.dp - 1)
    return {
        "boundary_fwd": (passes * crossed * each.forward, passes * dense),
        "boundary_bwd": (crossed * each.backward, dense),
        # statistics summed over the replicas, tables sent to the other replicas, and by each of them across the boundary
        "basis": (tables * (ring * each.statistics + (2 * swarm.dp - 1) * each.tables), 0.0),
    }


def _table_rate(config: RunConfig, each: CodecCost, ticks: int) -> float:
    """How often a way's tables are sent, per tick."""
    return 1 / ticks if each.once else refresh_share(config, ticks)


def _syncs(config: RunConfig, params: Params, ticks: int) -> float:
    """Weights to one node with engines."""
    return sum(sync_bytes(config, params, ticks)) / ticks


def _snapshots(config: RunConfig, params: Params, ticks: int, sources: list[int]) -> float:
    """Weights to the anchor workers, who take turns, each with a stream of its own; if they listen to the engines'
    stream, its frames once more for each, or none beside an engine."""
    workers = config.anchor.workers
    if config.anchor.weights == "shared":
        apart = bool(sources) and config.anchor.resource != config.rollout.resource
        return apart * workers * _syncs(config, params, ticks)
    return sum(sum(stream_bytes(config, params, ticks, sources[k::workers])) for k in range(workers)) / ticks


def anchor_channels(config: RunConfig, ticks: int, sources: list[int], merges: float) -> dict[str, float]:
    """What the anchor gets and sends in a mean tick, of fires that start from the weights after the ticks `sources`."""
    params = parameters(config)
    return {
        "snapshot": _snapshots(config, params, ticks, sources),
        "replay": _replays(config, ticks, sources),
        "correction": merges * replica_nodes(config) * sum(correction_bytes(config, stage_parameters(config, params))),
    }


def _replays(config: RunConfig, ticks: int, sources: list[int]) -> float:
    """Samples to the anchor workers; a window reaches back to the fire before."""
    return sum(replay_bytes(config, b - a) for a, b in pairwise([-1, *sources])) / ticks


def _control_bytes(config: RunConfig, params: Params, ticks: int, fires: float) -> tuple[float, float]:
    """Batches from the engines, shares of them to every worker, headers of what crosses a wire, agreements, M̄ handed on."""
    swarm, each = config.swarm, cost_of_codec(config, params.hidden)
    ranks, wires = swarm.dp * swarm.pp, swarm.dp * (swarm.pp - 1)
    shares = (sum(size) / config.grpo.ticks_per_step for size in zip(*dealt(config)))
    batches, unpacked = (a + b for a, b in zip(shares, _sampled(config, ticks)))
    passes = 1 + forward_passes(config, each.ways > 0, ticks)
    headers = 16 * wires * (passes * microbatch_count(config) + each.ways * refresh_share(config, ticks))
    ways = each.ways * len(config.swarm.boundaries)
    tables = 8 * (swarm.dp - 1) * ways * _table_rate(config, each, ticks)  # how long they are
    books = 2 * (swarm.dp - 1) * each.books * ways
    merger = merger_class(config.merger.kind).cost(config.merger, params.total)
    asked = merger.norms * merging_share(config, ticks) + merger.learns * fires
    norms = 2 * 8 * wires * (1 + asked)  # of the gradient, to clip it; of what the merger asks for
    digests = 8 * (swarm.dp - 1) * ranks * (ticks // swarm.check_every) / ticks if swarm.check_every else 0
    agreements = 2 * 8 * (ranks - 1) if agreed_on(config) else 0
    m_bar = FP32 * params.total * fires if config.anchor.workers > 1 else 0
    either = headers + norms
    sizes = _payload_sizes(config, params)
    return batches + either + digests + agreements + m_bar + tables + books + sizes, unpacked + either


def _sampled(config: RunConfig, ticks: int) -> Sizes:
    """Frames from the engines, a tick: a step's samples, and what validations are told."""
    grpo, steps, prompts = config.grpo, ticks // config.grpo.ticks_per_step, config.rollout.batch_size
    validations = 1 + -(-steps // config.val.every)  # before the first step, on schedule, after the last
    asked = _frames(config, grpo.train_batch_size, prompts, grpo.group_size)
    told = Sizes(*map(sum, zip(*(_told(config, one) for one in config.val.asked().values()))))
    return Sizes(*((steps * a + validations * t) / ticks for a, t in zip(asked, told)))


def _told(config: RunConfig, one: AskedSet) -> Sizes:
    """Of one set of one validation."""
    most = max(1, config.rollout.batch_size * config.grpo.group_size // one.samples)
    return _frames(config, one.count, most, one.samples, validation=True)


def _frames(config: RunConfig, prompts: int, most: int, samples: int, validation: bool = False) -> Sizes:
    """With `samples` answers to each of `prompts` prompts, `most` prompts in a frame."""
    whole, rest = divmod(prompts, most)
    sizes = [answers(config, most, samples, validation)] * whole
    sizes += [answers(config, rest, samples, validation)] if rest else []
    return Sizes(*(sum(size) for size in zip(*sizes)))
