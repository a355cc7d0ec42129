"""Layout invariance: one worker with virtual boundaries = dp = pp = dp x pp, with real gloo groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseGradient
from anchor_service.replay import unpack_replay
from codec.config import CodecConfig, GradientConfig
from codec.ledger import Ledger
from merger.config import MergerConfig
from rl.aggregation import weighted
from rl.batch import Batch
from rl.config import GrpoConfig, SnapshotConfig
from rl.grpo_config import LrSchedule
from rl.spans import spans
from swarm.grid import Grid
from swarm.peers import WrongSize
from tests.conftest import make_batch, on_ranks, with_environment
from tests.contract.harness import make_rank, run_ticks, signs_by_name

RTOL = 1e-4
# Adam divides by its own estimate of the gradient, so rounding of tiny gradients shows: 1 % of a step of lr 1e-3
ATOL = {"grad": 1e-6, "weights": 1e-5}


def _work(rank: int, init: str, options: dict, trainer_logprobs: bool, size: int, saved: dict | None) -> dict:
    state = make_rank(rank=rank, init=init, **options)
    for boundary in state.cuts.values() if saved else ():
        boundary.restore({name: torch.from_numpy(value) for name, value in saved.items()})
    batches = [cut_batch(s, options.get("grpo") == WEIGHED) for s in range(3)]
    corrections = {3: signs_by_name(state)} if state.held.merger.payload and not state.held.placebo else {}
    found = run_ticks(state, batches, corrections, trainer_logprobs=trainer_logprobs, size=size)
    return found | {"codec": {k: v.numpy().copy() for b in state.cuts.values() for k, v in b.state().items()}}


def cut_batch(seed: int, turns: bool = False) -> Batch:
    """Some of its answers were cut, which by default changes nothing. `turns`: some tokens are an environment's."""
    batch = replace(make_batch(seed=seed), truncated=np.arange(16) % 5 == 0)
    return with_environment(batch, seed) if turns else batch


def _layout(
    folder: Path, dp: int, pp: int, trainer_logprobs: bool = True, size: int = 3, state: dict | None = None, **options
) -> list[dict]:
    return on_ranks(dp * pp, _work, dict(folder=folder, dp=dp, pp=pp, **options), trainer_logprobs, size, state)


def _compare(reference: dict, ranks: list[dict], key: str) -> float:
    """Largest relative difference; every parameter of the reference must be held by some rank."""
    worst, seen = 0.0, set()
    for found in ranks:
        for name, value in found[key].items():
            expected = reference[key].get(name, reference[key].get("model.embed_tokens.weight"))
            np.testing.assert_allclose(value, expected, rtol=RTOL, atol=ATOL[key], err_msg=f"{key} {name}")
            scale = np.abs(expected).max()
            worst = max(worst, float(np.abs(value - expected).max() / max(scale, 1e-12)))
            seen.add(name)
    assert set(reference[key]) <= seen
    return worst


@pytest.mark.parametrize("kind", ["powersgd", "none"])
def test_losses_gradients_and_weights_do_not_depend_on_the_layout(model: Path, kind: str):
    codec = CodecConfig(kind=kind, rank=8 if kind == "powersgd" else None)
    options = dict(codec=codec, merger=MergerConfig(kind="signed_ema", adaptive_lambda_mode="ratio"))
    (reference,) = _layout(model, 1, 1, **options)
    for dp, pp in ((2, 1), (1, 2), (2, 2)):
        ranks = _layout(model, dp, pp, **options)
        losses = np.sum([r["losses"] for r in ranks], axis=0)
        np.testing.assert_allclose(losses, reference["losses"], rtol=RTOL)
        worst = _compare(reference, ranks, "grad")
        print(f"dp={dp} pp={pp} {kind}: largest relative gradient difference {worst:.1e}")
        _compare(reference, ranks, "weights")


WEIGHED = GrpoConfig(
    lr=1e-3,
    grad_clip=1e9,
    group_size=2,
    loss_agg_mode="seq-mean-token-mean",
    importance_sampling_level="sequence",
    clip_ratio_high=0.5,
    overlong_filter=True,
    zero_variance="drop",
    lr_schedule=LrSchedule(kind="cosine"),
)


def test_samples_that_weigh_differently_or_nothing_give_every_layout_and_the_anchor_the_same_gradient(
    untied_model: Path,
):
    options = dict(codec=CodecConfig(kind="none"), grpo=WEIGHED, trainer_logprobs=False)
    (reference,) = _layout(untied_model, 1, 1, **options)
    ranks = _layout(untied_model, 2, 2, **options, size=2)
    np.testing.assert_allclose(np.sum([r["losses"] for r in ranks], axis=0), reference["losses"], rtol=RTOL)
    _compare(reference, ranks, "grad")
    _compare(reference, ranks, "weights")
    rates = [report.values["actor/lr"] for report in reference["reports"]]
    assert rates == [1e-3 * WEIGHED.lr_schedule.factor(t, 100) for t in (1, 2, 3)] and rates[2] < rates[1] < 1e-3

    batch = weighted(cut_batch(0, turns=True), WEIGHED)
    assert 0 < (batch.loss_weights == 0).sum() < len(batch) and len(set(batch.loss_weights)) > 2
    frame = batch.to_frame(denominator=batch.loss_tokens)
    settings = untied_model, spans(4, [2], 2), torch.float32, torch.device("cpu"), 5, WEIGHED, 1.0
    anchor = DenseGradient(*settings, SnapshotConfig(encoding="full"))
    m = anchor.gradient(*unpack_replay(frame, "a replay"))
    for i, name in enumerate(anchor.model.weights.names):
        found = anchor.model.weights.view(i, m).numpy()
        np.testing.assert_allclose(found, reference["grad"][name], rtol=RTOL, atol=ATOL["grad"], err_msg=name)


def test_several_boundaries_mixed_virtual_and_wire(untied_model: Path):
    options = dict(boundaries=(1, 2, 3))
    (reference,) = _layout(untied_model, 1, 1, **options)
    for pp in (2, 4):
        ranks = _layout(untied_model, 1, pp, **options)
        np.testing.assert_allclose(np.sum([r["losses"] for r in ranks], axis=0), reference["losses"], rtol=RTOL)
        _compare(reference, ranks, "weights")


CODECS = {
    "powersgd": CodecConfig(kind="powersgd", rank=8),
    "own basis": CodecConfig(kind="powersgd", rank=8, backward_basis="own", first_token="exact"),
    "random_k": CodecConfig(kind="random_k", rank=8),
    "fixed": CodecConfig(coder="fixed", total_rate=0.2),
    "entropy": CodecConfig(coder="entropy", total_rate=0.2),
    "dithered": CodecConfig(dither=True, total_rate=0.2),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_virtual_and_wire_give_the_same_numbers_to_the_bit(untied_model: Path, codec: CodecConfig):
    # the norm is summed by stage, so clipping may round
    options = dict(codec=codec, grpo=GrpoConfig(lr=1e-3, grad_clip=1e9))
    (virtual,) = _layout(untied_model, 1, 1, **options)
    first, last = _layout(untied_model, 1, 2, **options)
    assert last["losses"] == virtual["losses"]
    np.testing.assert_array_equal(np.concatenate([first["flat"], last["flat"]]), virtual["flat"])


@pytest.mark.parametrize("name", ["random_k", "fixed", "entropy"])
def test_with_equal_tables_and_microbatches_a_quantiser_does_not_see_the_layout(untied_model: Path, name: str):
    """One sample a microbatch, and the tables of a run of one worker: then what is quantised is the same on any grid.

    Up to rounding: a coefficient between two steps may fall to either side, and then differs by a whole one. Of the
    first tick: each replica's coder learns from its own half, so they spend other bytes and a held rate other steps.
    `random_k` has no tables, and its values are rounded to bf16.
    """
    options = dict(codec=CODECS[name], size=1)
    (warm,) = _layout(untied_model, 1, 1, **options)
    options["state"] = warm["codec"]
    (reference,) = _layout(untied_model, 1, 1, **options)
    for dp, pp in ((2, 1), (1, 2), (2, 2)):
        ranks = _layout(untied_model, dp, pp, **options)
        loss = sum(r["losses"][0] for r in ranks)
        assert loss == pytest.approx(reference["losses"][0], rel=1e-3)
        found = {name: value for r in ranks for name, value in r["grad"].items()}
        error = sum(np.square(found[n] - g).sum() for n, g in reference["grad"].items())
        assert error < 1e-4 * sum(np.square(g).sum() for g in reference["grad"].values())


def test_virtual_and_wire_count_the_same_boundary_bytes(untied_model: Path):
    channels = ("boundary_fwd", "boundary_bwd", "basis")

    def counted(ranks: list[dict]) -> dict[str, np.ndarray]:
        reports = [report.ledger for r in ranks for report in r["reports"]]
        return {c: np.sum([r.get(c, (0.0, 0.0)) for r in reports], axis=0) for c in channels}

    virtual, wire = counted(_layout(untied_model, 1, 1)), counted(_layout(untied_model, 1, 2))
    for channel in channels:
        np.testing.assert_array_equal(virtual[channel], wire[channel])
        assert virtual[channel][0] > 0


GRADIENTS = {
    "dense": GradientConfig(),
    "powersgd": GradientConfig(kind="powersgd", rank=2),
    "powersgd, 4 bits": GradientConfig(kind="powersgd", rank=2, bits=4.0),
    "sign": GradientConfig(kind="sign"),
    "sparse": GradientConfig(kind="sparse", bits=0.5),
}


@pytest.mark.parametrize("dp, pp", [(1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_replicas_are_bit_identical_and_tied_copies_stay_equal(
    tied_model: Path, gradient: GradientConfig, dp: int, pp: int
):
    codec = CodecConfig(kind="powersgd", rank=8, gradient=gradient)
    ranks = _layout(tied_model, dp, pp, codec=codec, merger=MergerConfig(kind="signed_ema"))
    for p in range(pp):
        for d in range(1, dp):
            np.testing.assert_array_equal(ranks[d * pp + p]["flat"], ranks[p]["flat"])
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(ranks[0]["weights"][name], ranks[pp - 1]["weights"][name])
    sent = [report.ledger.get("tied", (0.0, 0.0)) for rank in ranks for report in rank["reports"]]
    (dense,) = {d for s, d in sent}
    assert dense > 0 and all((s == d) == (gradient.kind == "none") for s, d in sent)


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
def test_one_rank_alone_has_nothing_to_code(tied_model: Path, gradient: GradientConfig):
    """Whatever the kind: one worker without replicas, and without a second stage, keeps its own gradient."""
    one, other = (
        _layout(tied_model, 1, 1, codec=CodecConfig(kind="powersgd", rank=8, gradient=g))[0]
        for g in (gradient, GradientConfig())
    )
    np.testing.assert_array_equal(one["flat"], other["flat"])


def _at_odds(rank: int, init: str) -> str:
    grid = Grid(rank, 2, 1, torch.device("cpu"), Ledger(), 30, init)
    payload = torch.zeros(100 if rank else 10, dtype=torch.uint8)
    try:
        grid.replicas.gather(payload, [(10, 20), (10, 20)])
    except WrongSize as error:
        return str(error)
    except RuntimeError:  # the other one has left
        return "left alone"
    return "taken"


def test_a_payload_of_a_size_that_none_can_have_is_refused_before_it_comes():
    first, _ = on_ranks(2, _at_odds)
    assert first == "rank 1 would send 100 bytes of a gradient, expected 10 to 20"


def test_random_signs_do_not_depend_on_the_layout(tied_model: Path):
    anchor, merger = AnchorConfig(delay_k=1, cadence=2), MergerConfig(placebo="random")
    (reference,) = _layout(tied_model, 1, 1, anchor=anchor, merger=merger)
    assert [(r.merge.merged, r.merge.age) for r in reference["reports"]] == [(False, 0), (True, 0), (True, 1)]
    for dp, pp in ((2, 1), (2, 2)):
        _compare(reference, _layout(tied_model, dp, pp, anchor=anchor, merger=merger), "weights")


def test_the_own_placebo_is_the_same_on_replicas_and_tied_copies(tied_model: Path):
    anchor, merger = AnchorConfig(delay_k=2, cadence=1), MergerConfig(placebo="own")
    ranks = _layout(tied_model, 2, 2, anchor=anchor, merger=merger)
    assert [(r.merge.merged, r.merge.lag) for r in ranks[0]["reports"]] == [(False, 0), (True, 2), (True, 2)]
    for p in range(2):
        np.testing.assert_array_equal(ranks[2 + p]["flat"], ranks[p]["flat"])
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
