"""Parameters of a model, by arithmetic on its config.json: how many, of which shapes, on which stage. No torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, get_args

from deploy.estimate.published_models import PUBLISHED
from rl.lora_config import LoraConfig, Projection
from rl.model_files import local_folder, model_config
from rl.model_shape import ModelShape
from rl.spans import spans
from swarm.run_config import RunConfig


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
    layer_shapes: tuple[tuple[int, ...], ...]  # of one decoder layer: the projections first, as in `Projection`
    beneath: Params | None = None  # of the frozen model, where these are adapters

    @property
    def model(self) -> Params:
        """Of all that is computed with, but for adapters."""
        return self.beneath or self


def parameters(config: RunConfig) -> Params:
    """Those that the config trains. Raises ModelNotFound if the model's metadata can be found nowhere."""
    model = count_parameters(model_metadata(config.model.path))
    return adapter_parameters(model, config.model.lora) if config.model.lora.rank else model


def adapter_parameters(model: Params, lora: LoraConfig) -> Params:
    """Of adapters beside `model`, which is frozen."""
    ends = [shape for name, shape in zip(get_args(Projection), model.layer_shapes) if name in lora.targets]
    shapes = tuple(shape for out, into in ends for shape in ((lora.rank, into), (out, lora.rank)))
    per_layer = sum(map(prod, shapes))
    rest = model.layers, model.hidden, model.vocab, shapes
    return Params(model.layers * per_layer, 0, per_layer, 0, 0, False, *rest, beneath=model)


def model_metadata(path: str) -> dict[str, Any]:
    """Its config.json; for a hub id that is not on this machine the published shapes, where we have them."""
    if path in PUBLISHED and local_folder(path) is None:
        return PUBLISHED[path]
    return model_config(path)


def count_parameters(model: dict[str, Any]) -> Params:
    """From the content of a config.json: llama, mistral, qwen2 or qwen3. Raises ValueError on a missing key."""
    kind = model["model_type"]
    hidden, layers, vocab = model["hidden_size"], model["num_hidden_layers"], model["vocab_size"]
    tied = bool(model.get("tie_word_embeddings", False))
    shapes = tuple(_layer_shapes(model, kind))
    per_layer, embedding = sum(map(prod, shapes)), vocab * hidden
    head = 0 if tied else embedding
    total = embedding + layers * per_layer + hidden + head
    return Params(total, embedding, per_layer, head, hidden, tied, layers, hidden, vocab, shapes)


def _layer_shapes(model: dict[str, Any], kind: str) -> list[tuple[int, ...]]:
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


def attention_widths(model: dict[str, Any]) -> tuple[int, int]:
    """Width of the queries of one token, and of its keys."""
    heads = model["num_attention_heads"]
    # Qwen3's head is 128 wide unless told otherwise; the others split the hidden size
    default = 128 if model["model_type"] == "qwen3" else model["hidden_size"] // heads
    head_dim = model.get("head_dim") or default
    return heads * head_dim, (model.get("num_key_value_heads") or heads) * head_dim


def check_fits(config: RunConfig, params: Params) -> None:
    """What a config could not check of a hub id that is not on this machine. Raises ValueError."""
    config.check_fits(ModelShape(params.hidden, params.layers, params.vocab, params.tied, window=None, chat=True))


def stage_parameters(config: RunConfig, params: Params) -> list[int]:
    """Parameters that each stage holds, the last stage's copy of a tied embedding included."""
    return [sum(map(prod, shapes)) for shapes in stage_shapes(config, params)]


def stage_shapes(config: RunConfig, params: Params) -> list[list[tuple[int, ...]]]:
    """Shapes of the parameters that each stage holds."""
    table = params.vocab, params.hidden
    found: list[list[tuple[int, ...]]] = []
    for span in spans(params.layers, config.swarm.boundaries, config.swarm.pp):
        first, last = span.first and not params.beneath, span.last and not params.beneath
        shapes: list[tuple[int, ...]] = [table] if first else []
        shapes += list(params.layer_shapes) * (span.hi - span.lo)
        shapes += [(params.hidden,)] if last else []
        shapes += [table] if last and not (params.tied and first) else []  # the head, or a copy of a tied one
        found.append(shapes)
    return found


def own_shapes(config: RunConfig, params: Params) -> list[list[tuple[int, ...]]]:
    """Of the parameters that a stage sums with its replicas alone: all but an embedding that two stages hold."""
    found = stage_shapes(config, params)
    if tied_copies(config, params):
        found[0], found[-1] = found[0][1:], found[-1][:-1]
    return found


def tied_copies(config: RunConfig, params: Params) -> int:
    """How many ranks sum the gradient of a tied embedding that two stages hold; 0 where it is on one."""
    return 2 * config.swarm.dp if params.tied and config.swarm.pp > 1 else 0


Group = tuple[list[tuple[int, ...]], int]  # shapes that are summed, by how many ranks


def copy_groups(config: RunConfig, params: Params) -> tuple[list[Group], list[Group]]:
    """Who sums what: the replicas of each stage, if there are several, and the copies of a tied embedding, if there are."""
    dp, copies = config.swarm.dp, tied_copies(config, params)
    own = [(shapes, dp) for shapes in own_shapes(config, params)] if dp > 1 else []
    return own, [([(params.vocab, params.hidden)], copies)] if copies else []
