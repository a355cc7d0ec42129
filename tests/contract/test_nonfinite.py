"""A NaN is named by where it first appeared, with the knob of that place; in one process and in a grid."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseGradient
from anchor_service.errors import NotFinite
from anchor_service.messages import Correction
from codec.config import CodecConfig
from merger.config import MergerConfig
from rl.batch import Batch
from rl.config import GrpoConfig, SnapshotConfig
from rl.spans import spans
from swarm.messages import TickPlan
from swarm.nonfinite import explained, judge_loss
from swarm.tick import Rank, tick
from tests.conftest import make_batch, on_ranks
from tests.contract.harness import LAYERS, make_rank, mini_batch

NAN = float("nan")


def say(state: Rank, batch: Batch, correction: Correction | None = None) -> NotFinite:
    with pytest.raises(NotFinite) as caught:
        tick(state, TickPlan(1, 0, correction, int(correction is not None)), mini_batch(state, batch), lambda c: c)
    return caught.value


def break_weights(state: Rank, batch: Batch) -> None:
    state.stage.weights.master[state.stage.weights.slice_of("model.layers.2.mlp.up_proj.weight")][5] = NAN


def break_embedding(state: Rank, batch: Batch) -> None:
    state.stage.weights.master[3] = float("inf")


def break_advantages(state: Rank, batch: Batch) -> None:
    batch.advantages[0] = float("inf")


def break_a_layer(state: Rank, batch: Batch) -> None:
    """As an overflow in the layer's own numbers does: weights and input are finite."""
    state.stage.layers[1].register_forward_hook(lambda m, given, made: made * float("inf"))


def break_the_codec(state: Rank, batch: Batch) -> None:
    decode = state.cuts[2].forward.decode
    state.cuts[2].forward.decode = lambda *args: decode(*args) * NAN


def break_the_logits(state: Rank, batch: Batch) -> None:
    state.stage.lm_head.register_forward_hook(lambda m, given, made: made * NAN)


def break_the_way_back(state: Rank, batch: Batch) -> None:
    decode = state.cuts[2].backward.decode
    state.cuts[2].backward.decode = lambda *args: decode(*args) * NAN


def break_a_gradient(state: Rank, batch: Batch) -> None:
    """Of one parameter: nothing flows through it."""
    state.stage.layers[3].mlp.up_proj.weight.register_hook(lambda g: g * NAN)


PLACES: dict[Callable[[Rank, Batch], None], tuple[str, str]] = {
    break_weights: ("the weights of layer 2, before the tick", "model.path"),
    break_embedding: ("the weights of the embedding, before the tick", "model.path"),
    break_advantages: ("the advantages of the samples", "task.reward"),
    break_a_layer: ("the forward pass: what layer 1 gives", "model.dtype"),
    break_the_codec: ("the forward pass: what the codec gives to layer 2", "codec.kind"),
    break_the_logits: ("the forward pass: the logits", "model.dtype"),
    break_the_way_back: ("the backward pass: what the codec gives back to layer 1", "codec.kind"),
    break_a_gradient: ("the gradient of layer 3", "grpo.lr"),
}


@pytest.mark.parametrize("fault", PLACES, ids=lambda fault: fault.__name__)
def test_the_first_place_is_named_with_its_knob(untied_model: Path, fault: Callable[[Rank, Batch], None]):
    state, batch = make_rank(untied_model, on_nan="stop"), make_batch()
    fault(state, batch)
    error = say(state, batch)
    first, knob = PLACES[fault]
    assert "worker d0p0: the gradient norm of tick 1 is" in error.what
    assert error.first.startswith(first) and knob in error.fix
    assert ("grpo.lr" in error.fix) == (
        fault in (break_weights, break_embedding, break_a_gradient, break_the_way_back)
    ) or ("codec" in error.first)


def test_a_correction_and_a_merge_that_bring_it_are_named(untied_model: Path):
    merger = MergerConfig(kind="delta")
    state = make_rank(untied_model, on_nan="stop", merger=merger, anchor=AnchorConfig(payload="dense"))
    state.held.sources[0] = torch.zeros(state.stage.weights.numel)
    values = torch.zeros(state.stage.weights.numel)
    values[7] = NAN
    error = say(state, make_batch(), Correction(1, 0, None, values, ""))
    assert error.first == "the anchor's correction" and "anchor" in error.fix

    state = make_rank(untied_model, on_nan="stop", merger=merger, anchor=AnchorConfig(payload="dense"))
    state.held.sources[0] = torch.zeros(state.stage.weights.numel)
    state.held.merger.apply = lambda g, c: g * NAN
    error = say(state, make_batch(), Correction(1, 0, None, torch.zeros(state.stage.weights.numel), ""))
    assert "the merge" in error.first and "merger" in error.fix


def _in_a_grid(rank: int, init: str, folder: Path, fault: str) -> tuple[str, bool]:
    state = make_rank(folder, rank, dp=2, pp=2, init=init, timeout_s=20, on_nan="stop")
    batch = make_batch()
    if fault == "stage" and rank % 2 == 1:
        state.stage.layers[0].register_forward_hook(lambda m, given, made: made * NAN)
    if fault == "sample":
        batch.advantages[int(np.argmax(batch.total))] = NAN  # the longest is dealt to the first replica
    error = say(state, batch)
    return error.first, error.secondhand


def test_every_stage_names_the_place_in_one_of_them(untied_model: Path):
    assert set(on_ranks(4, _in_a_grid, untied_model, "stage")) == {("the forward pass: what layer 2 gives", False)}


def test_a_replica_without_the_sample_that_brought_it_leaves_the_word_to_the_other(untied_model: Path):
    first, *_, last = found = on_ranks(4, _in_a_grid, untied_model, "sample")
    assert first == ("the advantages of the samples", False) and found[0] == found[1]
    assert last[1] and "another replica" in last[0] and found[2] == found[3]


def test_a_codec_that_refuses_what_is_not_finite_has_its_cause_named(untied_model: Path):
    codec = CodecConfig(kind="transform", total_rate=0.3)
    state, batch = make_rank(untied_model, codec=codec, on_nan="stop"), make_batch()
    break_weights(state, batch)
    state.stage.weights.master[5] = NAN  # below the boundary too
    mini = mini_batch(state, batch)
    with pytest.raises(NotFinite, match=r"hold a NaN.*First seen in the weights of the embedding.*model\.path"):
        with explained(state, mini.micros):
            tick(state, TickPlan(1, 0, None, 0), mini, lambda c: c)
    state, batch = make_rank(untied_model, codec=codec, on_nan="stop"), make_batch()
    break_a_layer(state, batch)
    mini = mini_batch(state, batch)
    with pytest.raises(ValueError, match="hold a NaN") as caught:
        with explained(state, mini.micros):
            tick(state, TickPlan(1, 0, None, 0), mini, lambda c: c)
    assert caught.value.__notes__ == ["in worker d0p0, which has layers 0 to 3; its weights are finite"]


@pytest.mark.parametrize(
    ("broken", "first"),
    [
        ("weights", "the weights that it was given"),
        ("advantages", "the advantages of the samples"),
        ("", "its own passes"),
    ],
)
def test_the_anchor_names_what_makes_its_gradient_a_nan(untied_model: Path, broken: str, first: str):
    device = torch.device("cpu")
    options = torch.float32, device, 4, GrpoConfig(), 1.0, SnapshotConfig()
    dense, batch = DenseGradient(untied_model, spans(LAYERS, [2], 1), *options), make_batch()
    if broken == "weights":
        dense.model.weights.master[9] = NAN
    elif broken:
        getattr(batch, broken)[2] = NAN
    m = dense.gradient(batch, batch.response_tokens).clone()
    if not broken:
        dense.check(m, batch, 4)  # a healthy one passes
        m[3] = NAN
    with pytest.raises(NotFinite, match="the anchor: its gradient at the weights of tick 4") as caught:
        dense.check(m, batch, 4)
    assert caught.value.first.startswith(first)


@pytest.mark.parametrize(
    ("field", "first"),
    [("advantages", "the advantages"), ("rollout_logprobs", "the log-probs that the engine"), ("", "the forward pass")],
)
def test_a_loss_that_is_a_nan_stops_the_run_though_the_gradient_is_finite(field: str, first: str):
    batch = make_batch()
    judge_loss(0.5, batch, 3)
    if field:
        getattr(batch, field)[1] = NAN
    with pytest.raises(NotFinite, match="actor/pg_loss of tick 3 is nan") as caught:
        judge_loss(NAN, batch, 3)
    assert caught.value.first.startswith(first)


def test_it_survives_pickling_with_all_it_says():
    error = NotFinite("the norm is nan", "the weights", "lower grpo.lr")
    error.secondhand = True
    error.add_note("raised by worker d0p0")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.secondhand and copy.__notes__ == error.__notes__
