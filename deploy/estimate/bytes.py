"""Parameters and bytes of a config, by arithmetic: shared by `plan` and `simulate`. No torch, no Ray, no weights.

Every channel is counted as the code counts it when it runs (`codec/ledger.py`: a sender counts, a ring
all-reduce over n ranks is 2(n-1)/n of its bytes on each of them). What is approximate says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

from anchor_service.lag import Due, agenda
from codec.ledger import CHANNELS
from codec.schedule import q_should_refresh
from deploy.estimate.boundary_cost import Crossing, crossing
from deploy.estimate.delta_size import Course, Walk, walk
from deploy.estimate.published_models import PUBLISHED
from merger import MERGERS
from rl.batch import Batch
from rl.model_files import local_folder, model_config
from swarm.run_config import RunConfig

FP32 = 4
BOOKS = 5 * 8  # bytes of what one way sent in a tick, float64


class StageSpan(NamedTuple):
    """Decoder layers [lo, hi) of one pipeline stage."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Params:
    """Parameters by part. `per_layer` is one decoder layer, `head` 0 if tied (then it is the embedding again)."""

    total: int
    embedding: int
    per_layer: int
    head: int
    norm: int
    tied: bool
    layers: int
    hidden: int
    vocab: int
    layer_shapes: tuple[tuple[int, ...], ...]  # of one decoder layer, in no particular order


def parameters(config: RunConfig) -> Params:
    """Of the config's model. Raises ModelNotFound if its metadata can be found nowhere."""
    return count_parameters(model_metadata(config.model.path))


def model_metadata(path: str) -> dict:
    """Its config.json; for a hub id that is not on this machine the published shapes, where we have them."""
    if path in PUBLISHED and local_folder(path) is None:
        return PUBLISHED[path]
    return model_config(path)


def count_parameters(model: dict) -> Params:
    """From the content of a config.json: llama, mistral, qwen2 or qwen3. Raises ValueError on a missing key."""
    kind = model["model_type"]
    hidden, layers, vocab = model["hidden_size"], model["num_hidden_layers"], model["vocab_size"]
    tied = bool(model.get("tie_word_embeddings", False))
    shapes = tuple(_layer_shapes(model, kind))
    per_layer, embedding = sum(map(prod, shapes)), vocab * hidden
    head = 0 if tied else embedding
    total = embedding + layers * per_layer + hidden + head
    return Params(total, embedding, per_layer, head, hidden, tied, layers, hidden, vocab, shapes)


def _layer_shapes(model: dict, kind: str) -> list[tuple[int, ...]]:
    def need(key: str) -> int:
        if model.get(key) is None:
            raise ValueError(f"the model's config.json has no {key}: its parameters cannot be counted")
        return model[key]

    hidden, inner, heads = need("hidden_size"), need("intermediate_size"), need("num_attention_heads")
    if kind != "llama":
        need("num_key_value_heads")
    q, kv = attention_widths(model)
    head_dim = q // heads
    shapes: list[tuple[int, ...]] = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    bias = kind in ("llama", "qwen3") and model.get("attention_bias", False)
    if bias or kind == "qwen2":
        shapes += [(q,), (kv,), (kv,)]
    if bias:
        shapes.append((hidden,))
    if kind == "llama" and model.get("mlp_bias", False):
        shapes += [(inner,), (inner,), (hidden,)]
    if kind == "qwen3":
        shapes += [(head_dim,), (head_dim,)]
    return shapes


def attention_widths(model: dict) -> tuple[int, int]:
    """Width of the queries of one token, and of its keys."""
    heads = model["num_attention_heads"]
    # Qwen3's head is 128 wide unless told otherwise; the others split the hidden size
    default = 128 if model["model_type"] == "qwen3" else model["hidden_size"] // heads
    head_dim = model.get("head_dim") or default
    return heads * head_dim, (model.get("num_key_value_heads") or heads) * head_dim


def stage_spans(config: RunConfig, layers: int) -> list[StageSpan]:
    """What `rl.policy.spans` gives, without torch."""
    cuts = [0, *config.swarm.boundaries, layers]
    each = (len(cuts) - 1) // config.swarm.pp
    return [StageSpan(cuts[p * each], cuts[(p + 1) * each]) for p in range(config.swarm.pp)]


def stage_parameters(params: Params, spans: list) -> list[int]:
    """Parameters that each stage holds, the last stage's copy of a tied embedding included. Spans have `lo`, `hi`."""
    return [sum(map(prod, shapes)) for shapes in stage_shapes(params, spans)]


def stage_shapes(params: Params, spans: list) -> list[list[tuple[int, ...]]]:
    """Shapes of the parameters that each stage holds."""
    table, found = (params.vocab, params.hidden), []
    for span in spans:
        first, last = span.lo == 0, span.hi == params.layers
        shapes = [table] if first else []
        shapes += list(params.layer_shapes) * (span.hi - span.lo)
        shapes += [(params.hidden,)] if last else []
        shapes += [table] if last and not (params.tied and first) else []  # the head, or a copy of the tied embedding
        found.append(shapes)
    return found


# --- tokens --------------------------------------------------------------------------------------


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


# --- bytes of single messages --------------------------------------------------------------------


def crossing_of(config: RunConfig, hidden: int) -> Crossing:
    """What crosses one boundary of this run. Raises ValueError for a codec of somebody else's."""
    tokens = max(1.0, total_ticks(config) * tokens_per_tick(config) / config.swarm.dp)
    return crossing(config.codec, hidden, itemsize(config), tokens, prompt_tokens(config) + response_tokens(config))


def itemsize(config: RunConfig) -> int:
    """Bytes of one number that crosses a boundary: it has the compute dtype."""
    return 2 if config.model.dtype == "bfloat16" else 4


def batch_bytes(config: RunConfig, samples: int) -> int:
    """A frame of that many samples of mean length."""
    tokens, responses = prompt_tokens(config) + response_tokens(config), response_tokens(config)
    return _batch_bytes(samples, round(samples * tokens), round(samples * responses), bool(config.grpo.kl_loss_coef))


@cache
def _batch_bytes(samples: int, tokens: int, responses: int, with_ref: bool) -> int:
    each = np.zeros(samples, np.float32)
    batch = Batch(
        tokens=np.zeros(tokens, np.int32),
        prompt=each.view(np.int32),
        total=each.view(np.int32),
        rollout_logprobs=np.zeros(responses, np.float32),
        ref_logprobs=np.zeros(responses if with_ref else 0, np.float32),
        rewards=each,
        advantages=each,
        truncated=np.zeros(samples, bool),
    )
    return batch.to_frame(step=1, index=1, denominator=responses).nbytes


def replay_bytes(config: RunConfig) -> float:
    """The batch that goes to the anchor with a snapshot."""
    samples = samples_per_tick(config)
    fraction = config.anchor.replay_fraction
    return batch_bytes(config, samples if fraction == 1 else max(1, round(fraction * samples)))


def snapshot_bytes(config: RunConfig, params: Params, apart: float | None = None) -> float:
    """One snapshot on its way to an engine or the anchor, `apart` ticks after the last; None: the first of its stream."""
    if full(config):
        return params.total * snapshot_itemsize(config)
    ticks = total_ticks(config)
    found = weights_walk(config, params, ticks)
    each = found.whole if apart is None else found.between(ticks - min(ticks, max(1, round(apart))), ticks)
    return params.total * each


def stream_bytes(config: RunConfig, params: Params, ticks: int, sent: list[int]) -> float:
    """All snapshots of one stream that sends the weights after the ticks `sent`, in a run of `ticks`."""
    if full(config) or not sent:
        return len(sent) * params.total * snapshot_itemsize(config)
    found = weights_walk(config, params, ticks)
    return params.total * (found.whole + sum(found.between(a, b) for a, b in pairwise(sent)))


def full(config: RunConfig) -> bool:
    return config.snapshot.encoding == "full"


def snapshot_itemsize(config: RunConfig) -> int:
    return 2 if (config.snapshot.dtype or config.model.dtype) == "bfloat16" else FP32


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
        bf16=snapshot_itemsize(config) == 2,
        ticks=ticks,
    )
    return walk(course)


def correction_payload(config: RunConfig) -> str | None:
    """`sign`, `dense`, or None where nothing is merged."""
    payload = MERGERS[config.merger.kind].payload if config.anchor.enabled else None
    return "dense" if payload and config.anchor.payload == "dense" else payload


def correction_bytes(config: RunConfig, stages: list[int]) -> list[int]:
    """One correction frame for each of `stages` (their parameters), without its header.

    An upper bound for sign planes. Where M̄ is 0 they cost next to nothing: after batches without an advantage
    all of them. Nor do a large head's fill their bits: on few samples, rows of tokens that nobody expects repeat
    the signs of one hidden state (SmolLM2, 8 samples a tick: 3 to 12 % off the whole).
    """
    payload = correction_payload(config)
    return [0 if payload is None else FP32 * n if payload == "dense" else -(-n // 8) for n in stages]


def gradient_bytes(config: RunConfig, shapes: list[tuple[int, ...]]) -> float:
    """What one stage's gradient comes to in the sum over replicas, before the ring's factor."""
    gradient, numbers = config.codec.gradient, 0
    for shape in shapes:
        n = prod(shape)
        low = gradient.kind == "powersgd" and len(shape) == 2 and gradient.rank * sum(shape) < n
        numbers += min(gradient.rank, *shape) * sum(shape) if low else n
    return FP32 * numbers


# --- bytes of a tick -----------------------------------------------------------------------------


def total_ticks(config: RunConfig) -> int:
    return config.run.steps * config.grpo.ticks_per_step


def expected_fires(config: RunConfig, ticks: int) -> list[Due]:
    """Lockstep: the agenda. Wall clock: about what comes of workers that need delay_k ticks for each fire."""
    anchor = config.anchor
    if correction_payload(config) is None:
        return []
    if anchor.clock == "lockstep":
        return agenda(anchor, config.run.seed, ticks)
    return [Due(i, s, s + anchor.delay_k) for i, s in enumerate(_evenly(anchor.workers / anchor.delay_k, ticks), 1)]


def _evenly(rate: float, ticks: int) -> list[int]:
    """About `rate` of the first `ticks` ticks, at most each of them."""
    return np.unique(np.arange(0, ticks, max(1.0, 1 / rate)).astype(int)).tolist() if rate else []


def fires_per_tick(config: RunConfig, ticks: int | None = None) -> float:
    ticks = ticks or total_ticks(config)
    return len(expected_fires(config, ticks)) / ticks


def tick_bytes(
    config: RunConfig, ticks: int | None = None, fires: float | None = None, merges: float | None = None
) -> dict[str, tuple[float, float]]:
    """{channel: (sent, dense)} of all links together, for a mean tick of a run of `ticks` (default: the config's).

    `fires`: fires started per tick, `merges`: corrections that reached the ranks per tick; default
    those of `expected_fires` for both. Exact up to frame headers but for: token counts (assumed means), deltas
    (measured on a sample), sign planes that repeat themselves, and fires that an old trace never merged.
    """
    params, swarm = parameters(config), config.swarm
    ticks = ticks or total_ticks(config)
    sources = [due.source_tick for due in expected_fires(config, ticks)] if fires is None else _evenly(fires, ticks)
    fires = len(sources) / ticks if fires is None else fires
    merges = fires if merges is None else merges
    shapes = stage_shapes(params, stage_spans(config, params.layers))
    stages = [sum(map(prod, s)) for s in shapes]
    ring = 2 * (swarm.dp - 1)  # 2(n-1)/n on each of n replicas

    crossed = tokens_per_tick(config) * len(swarm.boundaries)
    passes = 2 if config.grpo.old_logprobs == "trainer" else 1
    each, hidden = crossing_of(config, params.hidden), params.hidden
    refreshes = sum(q_should_refresh(t, config.q_cadence) for t in range(1, ticks + 1)) / ticks
    basis = each.ways * len(swarm.boundaries) * (1 / ticks if each.once else refreshes)
    tied = 2 * swarm.dp * FP32 * params.embedding if params.tied and swarm.pp > 1 else 0
    syncs = (1 / config.grpo.ticks_per_step + 1 / ticks) * config.rollout.replicas
    control = _control_bytes(config, params, ticks, fires, each, refreshes)

    found = {
        "boundary_fwd": (passes * crossed * each.forward, passes * crossed * hidden * itemsize(config)),
        "boundary_bwd": (crossed * each.backward, crossed * hidden * itemsize(config)),
        # statistics summed over the replicas, tables sent to the other replicas, and by each of them across the boundary
        "basis": (basis * (ring * each.statistics + (2 * swarm.dp - 1) * each.tables), 0),
        "grad_dp": (ring * sum(gradient_bytes(config, s) for s in shapes), ring * FP32 * sum(stages)),
        "tied": (tied, tied),
        "snapshot": (_snapshots(config, params, ticks, sources), 0),
        "replay": (fires * replay_bytes(config), 0),
        "correction": (merges * swarm.dp * sum(correction_bytes(config, stages)), 0),
        "rollout_sync": (_syncs(config, params, ticks), syncs * itemsize(config) * params.total),
        "control": control,
    }
    return {channel: tuple(map(float, found[channel])) for channel in CHANNELS}


def _syncs(config: RunConfig, params: Params, ticks: int) -> float:
    """Weights to the engines: before the first step, then after every step."""
    sent = list(range(0, ticks + 1, config.grpo.ticks_per_step))
    return config.rollout.replicas * stream_bytes(config, params, ticks, sent) / ticks


def _snapshots(config: RunConfig, params: Params, ticks: int, sources: list[int]) -> float:
    """Weights to the anchor workers, who take turns, each with a stream of its own; if they listen to the engines'
    stream, its frames once more for each, or none beside an engine."""
    workers = config.anchor.workers
    if config.anchor.weights == "shared":
        apart = bool(sources) and config.anchor.resource != config.rollout.resource
        return apart * workers * _syncs(config, params, ticks) / config.rollout.replicas
    return sum(stream_bytes(config, params, ticks, sources[k::workers]) for k in range(workers)) / ticks


def _control_bytes(
    config: RunConfig, params: Params, ticks: int, fires: float, each: Crossing, refreshes: float
) -> tuple[float, float]:
    """Batches from the engines and to every worker, headers of what crosses a wire, agreements, M̄ handed on."""
    swarm = config.swarm
    ranks, wires = swarm.dp * swarm.pp, swarm.dp * (swarm.pp - 1)
    batches = ranks * batch_bytes(config, samples_per_tick(config)) + _sampled(config, ticks)
    passes = 3 if config.grpo.old_logprobs == "trainer" else 2
    headers = 16 * wires * (passes * microbatches(config) + each.ways * refreshes)
    ways = each.ways * len(config.swarm.boundaries)
    tables = 8 * (swarm.dp - 1) * ways * (1 / ticks if each.once else refreshes)  # how long they are
    books = 2 * (swarm.dp - 1) * BOOKS * ways if config.codec.kind == "transform" else 0  # of a held rate
    gate = 2 * _merging(config, ticks) if config.merger.adaptive_lambda_mode == "ratio" else 0
    norms = 2 * 8 * wires * (1 + gate)  # of the gradient, to clip it; of δ and G_comp, to gate it
    digests = 8 * (swarm.dp - 1) * ranks * (ticks // swarm.check_every) / ticks if swarm.check_every else 0
    agreements = 2 * 8 * (ranks - 1) if correction_payload(config) else 0
    m_bar = FP32 * params.total * fires if config.anchor.workers > 1 else 0
    dense = batches + headers + norms
    return dense + digests + agreements + m_bar + tables + books, dense


def _merging(config: RunConfig, ticks: int) -> float:
    """Share of the ticks that hold a correction."""
    firsts = [due.first_tick for due in expected_fires(config, ticks) if due.first_tick and due.first_tick <= ticks]
    return (ticks + 1 - min(firsts)) / ticks if firsts else 0.0


def _sampled(config: RunConfig, ticks: int) -> float:
    """Frames from the engines, a tick: a step's prompts, and those of validations, `rollout.batch_size` in each."""
    grpo, steps = config.grpo, ticks // config.grpo.ticks_per_step
    validations = 1 + -(-steps // config.val.every)  # before the first step, on schedule, after the last
    asked = steps * _answers(config, grpo.train_batch_size, grpo.group_size)
    return (asked + validations * _answers(config, config.val.size, 1)) / ticks


def _answers(config: RunConfig, prompts: int, samples: int) -> int:
    """Frames with `samples` answers to each of `prompts` prompts."""
    whole, rest = divmod(prompts, config.rollout.batch_size)
    last = batch_bytes(config, rest * samples) if rest else 0
    return whole * batch_bytes(config, config.rollout.batch_size * samples) + last


def microbatches(config: RunConfig) -> int:
    """Microbatches of one replica in a tick."""
    return -(-(samples_per_tick(config) // config.swarm.dp) // config.swarm.micro_batch_size)
