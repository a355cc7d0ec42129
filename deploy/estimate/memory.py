"""Memory by role, by arithmetic on what the code allocates. Activations and scratch are rough; the rest is exact.

"device" is where the tensors live (the GPU, or the process on a CPU); "host" is beside it, always in RAM.
Process overhead (Python, torch, CUDA context: 0.5 to 1 GB) and the object store are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from anchor_service.clock import Lockstep
from anchor_service.config import correction_payload
from anchor_service.lag import agenda
from codec.costs import FP32, gradient_cost
from deploy.estimate.bytes import correction_bytes, full, snapshot_itemsize
from deploy.estimate.parameters import (
    Params,
    attention_widths,
    copy_groups,
    model_metadata,
    stage_parameters,
    stage_shapes,
)
from deploy.estimate.workload import microbatch_count, prompt_tokens, response_tokens
from merger import holds_planes, merger_class
from rl.config import CPU_KV_CACHE_GB, PACKED_FROM
from rl.spans import spans
from swarm.run_config import RunConfig

# parts that one expects to be the largest; anything else on top is worth a warning
EXPECTED = {
    "fp32 masters",
    "Adam moments",
    "activations",
    "KV cache",
    "compute copy",
    "fp32 gradients",
    "frozen weights",
}

LEAVES = ("vLLM's weights", "KV cache")  # the GPU, while a colocated engine sleeps


@dataclass(frozen=True)
class Part:
    """Bytes of one thing that a role holds."""

    role: str
    name: str
    bytes: float
    where: str = "device"
    rough: bool = False
    during: str = "always"  # what is there during `backward` is not there during `merge`


def memory(config: RunConfig, params: Params) -> list[Part]:
    """Every part of every role: one worker of each stage, one engine, one anchor worker, the diagnoser."""
    parts = [part for p in range(config.swarm.pp) for part in worker(config, params, p)]
    parts += engine(config, params)
    parts += anchor(config, params) if config.anchor.enabled else []
    parts += diagnoser(config, params) if config.diagnostics.every else []
    return [part for part in parts if part.bytes]


def _model(config: RunConfig, role: str, n: int, trained: bool) -> list[Part]:
    """Flat buffers of `rl.policy.Weights`."""
    copies = config.model.itemsize * n if config.model.dtype != "float32" else 0
    parts = [Part(role, "fp32 masters", FP32 * n), Part(role, "compute copy", copies)]
    if trained:
        parts += [Part(role, "fp32 gradients", FP32 * n), Part(role, "compute gradients", copies)]
    return parts


def _frozen(config: RunConfig, role: str, n: int) -> Part:
    """Of the n parameters beneath adapters."""
    return Part(role, "frozen weights", config.model.itemsize * n)


def _error_feedback(config: RunConfig, params: Params, p: int) -> int:
    own, tied = copy_groups(config, params)
    summed = own[p : p + 1] + (tied if p in (0, config.swarm.pp - 1) else [])
    return sum(gradient_cost(config.codec.gradient, shapes, copies).kept for shapes, copies in summed)


def worker(config: RunConfig, params: Params, p: int) -> list[Part]:
    span, shapes = spans(params.layers, config.swarm.boundaries, config.swarm.pp)[p], stage_shapes(config, params)[p]
    n, role = sum(map(prod, shapes)), f"worker stage {p}"
    beneath = stage_shapes(config, params.beneath)[p] if params.beneath else []
    owned = n - (params.embedding if params.tied and span.last and p else 0)
    payload = correction_payload(config.anchor, config.merger)
    merger = merger_class(config.merger.kind)
    packed = holds_planes(merger, config.swarm.device, n)  # in two planes, if there are zeros
    held = n / 4 if payload and packed else {"sign": n, "dense": FP32 * n, None: 0}[payload]
    alive = min(config.swarm.pp - p, microbatch_count(config))
    exact = config.anchor.workers if payload and config.anchor.weights == "swarm" else 0
    bases = (arriving_itemsize(config) + exact * snapshot_itemsize(config)) * owned
    error = _error_feedback(config, params, p)
    return [
        *_model(config, role, n, trained=True),
        _frozen(config, role, sum(map(prod, beneath))),
        Part(role, "Adam moments", 2 * FP32 * n),
        Part(role, "correction held", held),
        Part(role, "placebo", _placebo(config, n)),
        Part(role, "merger's state", merger.cost(config.merger, n).state),
        Part(role, "error feedback", error),
        Part(
            role,
            "gradients of source ticks",
            FP32 * n * _fires_under_way(config) if payload and merger.needs_source else 0,
        ),
        # `Rank.norm` and the merge go block by block; float64 squares of one block are the largest scratch
        Part(role, "scratch of norm and merge", 16 * min(owned, 1 << 22), rough=True, during="merge"),
        *activations(config, params, role, alive, span.hi - span.lo, config.swarm.micro_batch_size, span.last),
        Part(role, "bases of deltas", 0 if full(config) else bases, "host"),
        Part(role, "copy for a snapshot", FP32 * owned if exact and config.anchor.clock == "wall" else 0, "host"),
        Part(role, "kept for a diagnosis", 3 * FP32 * owned if config.diagnostics.every else 0, "host"),
    ]


def _fires_under_way(config: RunConfig) -> int:
    """At most."""
    anchor = config.anchor
    if not (anchor.enabled or config.merger.placebo):
        return 0
    if anchor.clock == "lockstep":
        return Lockstep(agenda(anchor, config.run.seed, config.ticks)).bound()
    return -(-anchor.delay_k // anchor.cadence)


def _placebo(config: RunConfig, n: int) -> float:
    """Its signs, int8, and with `own` an average and the gradients of ticks from which a fire is under way."""
    own = FP32 * (1 + _fires_under_way(config)) if config.merger.placebo == "own" else 0
    return (1 + own) * n if config.merger.placebo else 0


def activations(
    config: RunConfig, params: Params, role: str, alive: int, layers: int, samples: int, logits: bool
) -> list[Part]:
    """Rough: what autograd keeps of a decoder layer with SDPA, or with checkpointing of its input, and of the logits.

    `alive` microbatches of `samples` samples of mean length are under way at once.
    """
    model, size = model_metadata(config.model.path), config.model.itemsize
    hidden, (q, kv) = params.hidden, attention_widths(model)
    norms = 2 * (FP32 + size) * hidden  # each keeps its input in fp32 and its output
    layer = norms + size * (2 * hidden + 3 * q + 2 * kv + 4 * model["intermediate_size"])
    length = prompt_tokens(config) + response_tokens(config)
    rows = samples * length
    kept = alive * rows * layers * layer
    if config.swarm.activation_checkpointing:  # inputs of all layers, and the one that is computed again
        kept = alive * rows * layers * size * hidden + rows * layer
    parts = [Part(role, "activations", kept, rough=True, during="backward")]
    if logits:  # the head's output, in fp32, divided by the temperature, its log-softmax, and that one's gradient
        row = (size + 5 * FP32) * params.vocab
        nbytes = samples * response_tokens(config) * row
        parts.append(Part(role, "logits", nbytes, rough=True, during="backward"))
    return parts


def _beneath(params: Params) -> int:
    return params.beneath.total if params.beneath else 0


def engine(config: RunConfig, params: Params) -> list[Part]:
    role, n = "engine", params.total
    _, kv = attention_widths(model_metadata(config.model.path))
    rows = min(config.rollout.batch_size, config.grpo.train_batch_size) * config.grpo.group_size
    length = prompt_tokens(config) + config.grpo.max_response_length
    of_reference = [*_model(config, role, n, trained=False), _frozen(config, role, _beneath(params))]
    reference = sum(part.bytes for part in of_reference) if config.grpo.needs_reference else 0
    vllm, gib = config.rollout.engine == "vllm", config.rollout.kv_cache_gb
    cache = rows * length * 2 * kv * params.layers * config.model.itemsize
    if vllm and (gib or config.rollout.device == "cpu"):  # on a GPU it takes what `rollout.gpu_memory` leaves
        cache = (gib or CPU_KV_CACHE_GB) * 2**30
    return [
        *_model(config, role, n, trained=False),
        _frozen(config, role, _beneath(params)),
        Part(role, "matrices in oneDNN's layout", 0 if vllm else _packed(config, params)),
        Part(role, "vLLM's weights", config.model.itemsize * params.model.total if vllm else 0),
        Part(role, "reference model", reference),
        Part(role, "KV cache", cache, rough=not gib),
        # a row of fp32 log-probs, then fp64 probabilities and their running sum
        Part(role, "scratch of a draw", rows * params.vocab * 24, rough=True),
        Part(role, "weights as they arrive", 0 if full(config) else arriving_itemsize(config) * n, "host"),
    ]


def _packed(config: RunConfig, params: Params) -> float:
    """Bytes of the copies with which an engine of transformers multiplies on a CPU (`rl.packed_linear`)."""
    model = params.model
    of_layers = [shape for shape in model.layer_shapes if len(shape) == 2] * model.layers
    large = sum(n for n in map(prod, [*of_layers, (model.vocab, model.hidden)]) if n >= PACKED_FROM)
    return config.model.itemsize * large if config.rollout.device == "cpu" else 0


def arriving_itemsize(config: RunConfig) -> int:
    """Bytes of a weight that both ends of the engines' stream hold while one is sent: in fp32 where a coder adds to it."""
    return FP32 if config.snapshot.rate else snapshot_itemsize(config)


def anchor(config: RunConfig, params: Params) -> list[Part]:
    role, n = "anchor worker", params.total
    stages = stage_parameters(config, params)
    arriving = arriving_itemsize(config) if config.anchor.weights == "shared" else snapshot_itemsize(config)
    return [
        *_model(config, role, n, trained=True),
        _frozen(config, role, _beneath(params)),
        *activations(config, params, role, 1, params.layers, config.anchor.micro_batch_size, logits=True),
        Part(role, "M", FP32 * n, "host"),
        Part(role, "M̄, old and new", 2 * FP32 * n, "host"),
        Part(role, "weights as they arrive", 0 if full(config) else arriving * n, "host"),
        Part(role, "corrections", sum(correction_bytes(config, stages)), "host"),
    ]


def diagnoser(config: RunConfig, params: Params) -> list[Part]:
    """Its vectors at the most: those of a record and M̄, the update, g, ∇R, ∇len, then θ_s, M_d and M_s."""
    role, n = "diagnoser", params.total
    return [
        *_model(config, role, n, trained=True),
        _frozen(config, role, _beneath(params)),
        *activations(config, params, role, 1, params.layers, config.anchor.micro_batch_size, logits=True),
        Part(role, "gradients and weights compared", 9 * FP32 * n, "host"),
    ]


def peak(parts: list[Part], role: str, where: str) -> float:
    """Most bytes of a role at once."""
    mine = [part for part in parts if (part.role, part.where) == (role, where)]
    by_phase = {phase: sum(p.bytes for p in mine if p.during == phase) for phase in ("always", "backward", "merge")}
    return by_phase["always"] + max(by_phase["backward"], by_phase["merge"])


def largest(parts: list[Part]) -> dict[str, Part]:
    """The largest part of each role on its device."""
    here = [part for part in parts if part.where == "device"]
    return {role: max((q for q in here if q.role == role), key=lambda q: q.bytes) for role in {p.role for p in here}}
