"""Parameters and bytes of a config, by arithmetic: shared by `plan` and `simulate`. No torch, no Ray, no weights.

Every channel is counted as the code counts it when it runs (`codec/ledger.py`: a sender counts, a ring
all-reduce over n ranks is 2(n-1)/n of its bytes on each of them). What is approximate says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log10, prod
from typing import NamedTuple

from anchor_service.lag import agenda
from anchor_service.ring import q_should_refresh
from codec.ledger import CHANNELS
from deploy.config import RunConfig
from deploy.shapes import PUBLISHED
from merger import MERGERS
from rl.model_files import local_folder, model_config

FP32 = 4
HEADER, ALIGN = 256, 64  # of a batch frame, about; a row of arrays is padded to ALIGN


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


def width(config: RunConfig, hidden: int) -> int:
    """Numbers that cross a boundary for each token, each way."""
    return hidden if config.codec.kind == "none" else config.codec.rank_for(hidden)


def itemsize(config: RunConfig) -> int:
    """Bytes of one number that crosses a boundary: it has the compute dtype."""
    return 2 if config.model.dtype == "bfloat16" else 4


def batch_bytes(config: RunConfig, samples: float) -> float:
    """A frame of that many samples of mean length."""
    tokens, responses = prompt_tokens(config) + response_tokens(config), response_tokens(config)
    by_token = 4 * samples * (tokens + responses + (responses if config.grpo.kl_loss_coef else 0))
    lengths_and_scores, truncated = 4 * _aligned(4 * samples), _aligned(samples)
    return HEADER + by_token + ALIGN + lengths_and_scores + truncated


def _aligned(nbytes: float) -> int:
    return -(-ceil(nbytes) // ALIGN) * ALIGN


def replay_bytes(config: RunConfig) -> float:
    """The batch that goes to the anchor with a snapshot."""
    samples = samples_per_tick(config)
    fraction = config.anchor.replay_fraction
    return batch_bytes(config, samples if fraction == 1 else max(1, round(fraction * samples)))


def snapshot_bytes(config: RunConfig, params: Params, apart: float | None = None) -> float:
    """One snapshot on its way to an engine or the anchor, `apart` ticks after the last; None: the first of its stream.

    Exact for `snapshot.encoding` full. Of a delta the size is an estimate (`delta_share`).
    """
    return params.total * snapshot_itemsize(config) * (1.0 if full(config) else delta_share(config, apart))


def full(config: RunConfig) -> bool:
    return config.snapshot.encoding == "full"


def snapshot_itemsize(config: RunConfig) -> int:
    return 2 if (config.snapshot.dtype or config.model.dtype) == "bfloat16" else FP32


def delta_share(config: RunConfig, apart: float | None) -> float:
    """A delta's size as a share of the whole snapshot: an estimate.

    Fitted to Adam on 2M normal weights of scale 0.02 with noisy gradients, lr 1e-6 and 6e-5, 1 to 40 ticks
    apart, within a third: bf16 at 1e-6 0.8 % after one tick, 2.2 % after 5, 4.9 % after 20; fp32 36 to 68 %.
    """
    bf16 = snapshot_itemsize(config) == 2
    if apart is None:
        return 0.68 if bf16 else 0.84  # whole, but compressed
    travelled = max(1e-6, apart * config.grpo.lr / 1e-6)
    if not bf16:
        return min(0.84, max(0.05, 0.36 + 0.095 * log10(travelled)))
    changed = 0.008 * travelled**0.6
    return min(0.68, changed / (1 + changed / 0.8))


def correction_payload(config: RunConfig) -> str | None:
    """`sign`, `dense`, or None where nothing is merged."""
    payload = MERGERS[config.merger.kind].payload if config.anchor.enabled else None
    return "dense" if payload and config.anchor.payload == "dense" else payload


def correction_bytes(config: RunConfig, stages: list[int]) -> list[int]:
    """One correction frame for each of `stages` (their parameters).

    Exact zeros of M̄ are left out: they are rare, except in the rows of an untied embedding whose
    tokens never came up, which cost up to a second sign plane of the first stage.
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


def fires_per_tick(config: RunConfig, ticks: int | None = None) -> float:
    """Lockstep: exactly what the agenda has. Wall: approximate, a worker that needs delay_k ticks for a fire."""
    if correction_payload(config) is None:
        return 0.0
    ticks = ticks or total_ticks(config)
    if config.anchor.clock == "lockstep":
        return len(agenda(config.anchor, config.run.seed, ticks)) / ticks
    return min(1.0, config.anchor.workers / config.anchor.delay_k)


def tick_bytes(
    config: RunConfig, ticks: int | None = None, fires: float | None = None, merges: float | None = None
) -> dict[str, tuple[float, float]]:
    """{channel: (sent, dense)} of all links together, for a mean tick of a run of `ticks` (default: the config's).

    `fires`: fires started per tick, `merges`: corrections that reached the ranks per tick; default
    `fires_per_tick` for both. Exact up to frame headers but for: token counts (assumed means), exact zeros
    in sign planes, `control` (messages of the driver and small agreements, roughly), and fires that an
    old trace never merged.
    """
    params, swarm = parameters(config), config.swarm
    ticks = ticks or total_ticks(config)
    fires = fires_per_tick(config, ticks) if fires is None else fires
    merges = fires if merges is None else merges
    shapes = stage_shapes(params, stage_spans(config, params.layers))
    stages = [sum(map(prod, s)) for s in shapes]
    ring = 2 * (swarm.dp - 1)  # 2(n-1)/n on each of n replicas

    crossing = tokens_per_tick(config) * len(swarm.boundaries) * itemsize(config)
    passes = 2 if config.grpo.old_logprobs == "trainer" else 1
    r, hidden = width(config, params.hidden), params.hidden
    basis = FP32 * hidden * r * len(swarm.boundaries) if config.codec.kind != "none" else 0
    refreshes = sum(q_should_refresh(t, config.q_cadence) for t in range(1, ticks + 1)) / ticks
    tied = 2 * swarm.dp * FP32 * params.embedding if params.tied and swarm.pp > 1 else 0
    syncs = (1 / config.grpo.ticks_per_step + 1 / ticks) * config.rollout.replicas
    control = _control_bytes(config, refreshes if basis else 0)

    found = {
        "boundary_fwd": (passes * crossing * r, passes * crossing * hidden),
        "boundary_bwd": (crossing * r, crossing * hidden),
        # V summed over the replicas, Q sent to the other replicas, and by each of them across the boundary
        "basis": (refreshes * basis * (ring + swarm.dp - 1 + swarm.dp), 0),
        "grad_dp": (ring * sum(gradient_bytes(config, s) for s in shapes), ring * FP32 * sum(stages)),
        "tied": (tied, tied),
        "snapshot": (_snapshots(config, params, ticks, fires), 0),
        "replay": (fires * replay_bytes(config), 0),
        "correction": (merges * swarm.dp * sum(correction_bytes(config, stages)), 0),
        "rollout_sync": (_syncs(config, params, ticks), syncs * itemsize(config) * params.total),
        "control": control,
    }
    return {channel: tuple(map(float, found[channel])) for channel in CHANNELS}


def _syncs(config: RunConfig, params: Params, ticks: int) -> float:
    """Weights to the engines: before the first step, then after every step."""
    each = config.grpo.ticks_per_step
    run = snapshot_bytes(config, params) + ticks / each * snapshot_bytes(config, params, each)
    return config.rollout.replicas * run / ticks


def _snapshots(config: RunConfig, params: Params, ticks: int, fires: float) -> float:
    """Weights to the anchor workers, each with a stream of its own; none if they listen to the engines' stream."""
    if config.anchor.weights == "shared" or not fires:
        return 0.0
    workers = config.anchor.workers
    first = min(fires * ticks, workers)
    later = fires - first / ticks
    return first / ticks * snapshot_bytes(config, params) + later * snapshot_bytes(config, params, workers / fires)


def _control_bytes(config: RunConfig, refreshes: float) -> tuple[float, float]:
    """Batches to every worker and from the engines, message headers, digests, agreements. Approximate."""
    swarm, grpo = config.swarm, config.grpo
    samples, ranks = samples_per_tick(config), swarm.dp * swarm.pp
    batches = batch_bytes(config, samples) * (ranks + 1)
    passes = 3 if grpo.old_logprobs == "trainer" else 2
    headers = 16 * swarm.dp * (swarm.pp - 1) * (passes * microbatches(config) + refreshes)
    norm = 2 * 8 * swarm.dp * (swarm.pp - 1)
    digests = 8 * (swarm.dp - 1) * ranks / swarm.check_every if swarm.check_every else 0
    agreement = 2 * (ranks - 1) * 8 if correction_payload(config) else 0
    validations = 1 / (config.val.every * grpo.ticks_per_step) * batch_bytes(config, config.val.size)
    dense = batches + headers + norm + validations
    return dense + digests + agreement, dense


def microbatches(config: RunConfig) -> int:
    """Microbatches of one replica in a tick."""
    return -(-(samples_per_tick(config) // config.swarm.dp) // config.swarm.micro_batch_size)
