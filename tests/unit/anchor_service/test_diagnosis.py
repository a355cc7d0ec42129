"""The diagnosis against what its numbers mean: identities, derivatives, slow references."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from anchor_service.clock import Wall, make_clock
from anchor_service.config import AnchorConfig
from anchor_service.dense_gradient import DenseSetup
from anchor_service.diagnosis import (
    BLOCK,
    Diagnoser,
    compare,
    cosine,
    distance,
    dot,
    leave_one_out,
    noise,
    sign_agreement,
    staleness,
)
from anchor_service.messages import pack_record, unpack_records
from codec.frames import FrameError
from rl.batch import Batch
from rl.config import GrpoConfig, ModelConfig, SnapshotConfig
from rl.objective import logprobs, microbatches
from rl.spans import spans
from swarm.diagnosis_sources import Sources
from swarm.messages import MergeOutcome
from tests.conftest import make_batch

GROUP = 4


def diagnoser(folder: Path, boundaries: tuple[int, ...] = (2,), pp: int = 1) -> Diagnoser:
    stages = spans(4, list(boundaries), pp)
    return Diagnoser(
        DenseSetup(
            AnchorConfig(micro_batch_size=5),
            ModelConfig(path=str(folder)),
            GRPO,
            SnapshotConfig(),
            stages,
            1.0,
            False,
            1,
        )
    )


GRPO = GrpoConfig(group_size=GROUP, kl_loss_coef=0.1, entropy_coeff=0.1)


def vectors(n: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(3, n, generator=torch.Generator().manual_seed(3)))


def rollout(d: Diagnoser, weights: torch.Tensor, batch: Batch) -> np.ndarray:
    """Log-probs of the batch's responses under `weights`, in the batch's order."""
    d.dense.model.weights.master.copy_(weights)
    (micro,) = microbatches(batch, np.arange(len(batch)), len(batch), torch.device("cpu"))
    with torch.no_grad():
        return logprobs(d.dense.model, d.dense.model(micro.ids, micro.real, {}), micro, 1.0)[0].numpy()


def sampled(d: Diagnoser, weights: torch.Tensor, seed: int = 0) -> Batch:
    """Twelve samples whose recorded log-probs are those of `weights`."""
    batch = make_batch(12, seed=seed)
    return replace(batch, rollout_logprobs=rollout(d, weights, batch), ref_logprobs=np.zeros(0, np.float32))


def start(d: Diagnoser) -> torch.Tensor:
    return d.dense.model.weights.master.clone()


# --- the measures ----------------------------------------------------------------------------------


def test_sums_over_blocks_are_those_over_the_whole():
    a, b, _ = vectors(BLOCK + 17)
    assert dot(a, b) == pytest.approx(float(a.double() @ b.double()))
    assert distance(a, b) == pytest.approx(float((a.double() - b.double()).norm()))
    assert cosine(a, a) == pytest.approx(1) and cosine(a, -a) == pytest.approx(-1)


def test_signs_are_compared_where_the_truth_has_one():
    g = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0, 0.0])
    x = torch.tensor([9.0, -9.0, -9.0, 0.0, 0.0, 9.0])
    assert sign_agreement(x, g) == 2 / 4  # a zero in x does not agree, a zero in g does not count
    tiny = torch.full((3,), 1e-44)
    assert sign_agreement(tiny, tiny) == 1  # a product in fp32 would be 0


def test_what_a_zero_vector_leaves_undefined_is_none_and_never_nan():
    a, zero = vectors()[0], torch.zeros(1000)
    assert compare("x", a, zero) == {"cos_x": None, "sign_x": None}
    assert compare("x", zero, a) == {"cos_x": None, "sign_x": 0}
    found = staleness(zero, zero, a) | noise(zero, zero)
    assert all(value is None for value in found.values())


def test_the_split_of_the_error_telescopes():
    """g - M_s is the sum of the two parts as vectors, so the three norms close a triangle at every angle."""
    g, drifted, source = vectors()
    found, size = staleness(g, drifted, source), float(g.double().norm())
    a, b = (g - drifted).double() / size, (drifted - source).double() / size
    total = found["error_drift"] ** 2 + found["error_shift"] ** 2 + 2 * float(a @ b)
    assert found["error_total"] ** 2 == pytest.approx(total, rel=1e-5)
    assert staleness(g, g, source)["error_shift"] == found["error_total"]
    assert staleness(g, source, source)["error_drift"] == found["error_total"]


def test_the_noise_of_halves_is_that_between_two_independent_batches():
    """Batches are sums of independent groups: over many, the mean square of `error_noise` is that of batch minus batch."""
    rng, dims, groups = torch.Generator().manual_seed(0), 50, 8
    mean = torch.randn(dims, generator=rng)
    batches = mean + 3 * torch.randn(400, groups, dims, generator=rng)
    estimated = [
        (noise(b.sum(0), b[: groups // 2].sum(0))["error_noise"] * float(b.sum(0).norm())) ** 2 for b in batches
    ]
    seen = (batches[::2].sum(1) - batches[1::2].sum(1)).square().sum(1)
    assert np.mean(estimated) == pytest.approx(float(seen.mean()), rel=0.05)


def test_leave_one_out_takes_the_mean_of_the_others():
    values = np.array([1.0, 2.0, 6.0, 3.0, 3.0, 0.0], np.float32)
    found = leave_one_out(values, 3)
    slow = [v - np.mean(np.delete(values[g : g + 3], i)) for g in (0, 3) for i, v in enumerate(values[g : g + 3])]
    assert found == pytest.approx(slow)


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["rewards", "response_lengths"])
def test_the_effect_of_a_step_is_the_derivative_of_the_reweighted_mean(untied_model: Path, what: str):
    """Each sample weighted by how much likelier its whole response became, π_{θ+εΔ}/π_θ, by central differences."""
    d = diagnoser(untied_model)
    weights = start(d)
    batch = sampled(d, weights)
    values = getattr(batch, what)
    gradient = d.ascent(weights, batch, values)
    sample = np.repeat(np.arange(len(batch)), batch.response_lengths)
    step = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    step = step / step.norm() + gradient / gradient.norm()

    def mean(eps: float) -> float:
        moved = rollout(d, weights + eps * step, batch).astype(np.float64) - batch.rollout_logprobs
        likelier = np.exp(np.bincount(sample, moved, len(batch)))
        return float(np.mean(likelier * leave_one_out(values, GROUP)))

    eps = 1e-3
    assert dot(step, gradient) == pytest.approx((mean(eps) - mean(-eps)) / (2 * eps), rel=2e-2)


def test_the_effect_knows_no_clip_no_kl_and_no_entropy(untied_model: Path):
    """Far from the policy that sampled, every ratio is outside of the clip range."""
    d = diagnoser(untied_model)
    weights, batch = start(d), sampled(d, start(d))
    far = replace(batch, rollout_logprobs=batch.rollout_logprobs - 1)  # every ratio is e
    near, scaled = d.ascent(weights, batch, batch.rewards), d.ascent(weights, far, batch.rewards)
    torch.testing.assert_close(scaled, near * math.e, rtol=1e-4, atol=1e-6)


def record(stage_vectors: dict[str, torch.Tensor], tick: int, cuts: list[int] | None = None) -> list[np.ndarray]:
    """Records of the stages that whole vectors are cut into."""
    n = len(next(iter(stage_vectors.values())))
    edges = [0, *(cuts or []), n]
    arrays = {k: v.numpy() for k, v in stage_vectors.items()}
    return [
        pack_record({k: v[a:b] for k, v in arrays.items()}, tick, stage) for stage, (a, b) in enumerate(pairwise(edges))
    ]


def frame(batch: Batch) -> np.ndarray:
    return batch.to_frame(step=1, index=0, denominator=batch.response_tokens)


def test_a_correction_of_this_ticks_weights_and_batch_has_no_error_at_all(tied_model: Path):
    """delay 1, cadence 1: M_s and M_d are g, so the split is 0 to the bit and M̄ is exact."""
    d = diagnoser(tied_model)
    weights, batch = start(d), sampled(d, start(d))
    g = d.gradient(weights, batch, batch.response_tokens)
    now = {"before": weights, "g_comp": g, "merged": g, "after": weights - 1e-3 * g}
    source = record({"after": weights}, 6)
    found = d.diagnose(7, frame(batch), 6, g.numpy(), frame(batch), *record(now, 7), *source)
    for name in ("error_total", "error_drift", "error_shift"):
        assert found[f"diagnostics/{name}"] == 0
    for name in ("cos_m_bar", "cos_g_comp", "cos_merged", "cos_source", "cos_drift", "cos_shift", "sign_m_bar"):
        assert found[f"diagnostics/{name}"] == pytest.approx(1)
    sizes = [*record(now, 7), *source, frame(batch), frame(batch), g.numpy()]
    assert found["diagnostics/bytes"] == sum(x.nbytes for x in sizes)


def test_an_old_correction_is_split_as_the_gradients_say(untied_model: Path):
    d = diagnoser(untied_model, pp=2)
    old, cut = start(d), [9000]
    now = old + 0.02 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    before, after = sampled(d, old, seed=1), sampled(d, now, seed=2)
    g, drifted = (d.gradient(w, after, after.response_tokens) for w in (now, old))
    source = d.gradient(old, before, before.response_tokens)
    kept = {"before": now, "g_comp": g, "after": now}
    found = d.diagnose(9, frame(after), 3, None, frame(before), *record(kept, 9, cut), *record({"after": old}, 3, cut))
    for name, value in staleness(g, drifted, source).items():
        assert found[f"diagnostics/{name}"] == pytest.approx(value)
    assert 0 < found["diagnostics/error_drift"] and found["diagnostics/cos_drift"] < 1
    assert "diagnostics/cos_m_bar" not in found and "diagnostics/cos_merged" not in found
    assert found["diagnostics/gain_reward"] == 0 and "diagnostics/cos_update_reward" not in found  # it did not move


def test_a_tick_without_any_advantage_has_no_cosines_and_nothing_that_is_not_a_number(untied_model: Path):
    d = diagnoser(untied_model)
    weights, zero = start(d), np.zeros(12, np.float32)
    batch = replace(sampled(d, weights), advantages=zero, rewards=zero)
    d.grpo = d.dense.grpo = GrpoConfig(group_size=GROUP)
    kept = {"before": weights, "g_comp": torch.zeros_like(weights), "after": weights}
    found = d.diagnose(3, frame(batch), None, None, None, *record(kept, 3))
    assert all(math.isfinite(value) for value in found.values())
    assert not [name for name in found if "cos_" in name or "error_" in name]


def test_of_a_tick_whose_ranks_were_lost_after_it_nothing_is_said(untied_model: Path):
    """Others have the weights from a twin, and nothing of what the tick computed."""
    d = diagnoser(untied_model)
    weights = start(d)
    found = d.diagnose(3, frame(sampled(d, weights)), None, None, None, *record({"after": weights}, 3))
    assert set(found) == {"perf/max_memory_gb"}


# --- records and sources ---------------------------------------------------------------------------


def test_records_are_put_together_and_those_that_do_not_belong_are_refused():
    whole = {"after": torch.arange(10.0), "m_bar": torch.ones(10, dtype=torch.int8)}
    parts = record(whole, 4, [3])
    found = unpack_records(parts, 4, 10)
    assert all(found[k].dtype == torch.float32 and torch.equal(found[k], whole[k].float()) for k in whole)
    for bad, tick, numel in ((parts, 5, 10), (parts[::-1], 4, 10), (parts, 4, 11), (parts[:1], 4, 10)):
        with pytest.raises(FrameError):
            unpack_records(bad, tick, numel)
    with pytest.raises(FrameError, match="every stage"):
        unpack_records([parts[0], record({"after": torch.zeros(10)}, 4, [3])[1]], 4, 10)


@pytest.mark.parametrize(("delay", "cadence", "every"), [(1, 1, 7), (5, 5, 7), (20, 20, 7), (3, 2, 4), (5, 5, 5)])
def test_sources_are_kept_for_every_diagnosed_tick_and_no_longer(delay: int, cadence: int, every: int):
    clock = make_clock(AnchorConfig(delay_k=delay, cadence=cadence), 0, 120, 2)
    sources, version, lag = Sources(every, clock), 0, 0
    for tick in range(1, 121):
        for due in clock.to_start(tick - 1):
            if sources.wants(due):
                sources.keep(due, [], None)
        if due := clock.due(tick):
            version, lag = due.version, 0
        outcome = MergeOutcome(version, merged=True) if version else MergeOutcome()
        sources.settle(outcome)
        if sources.diagnosed(tick) and version:
            assert sources.merged(outcome).due.source_tick == tick - delay - lag
        assert len(sources._held) <= 1 + -(-delay // cadence)
        lag += 1
    if every > cadence:
        assert any(not sources.wants(due) for due in clock._by_first.values())


def test_on_the_wall_clock_all_sources_are_wanted_and_refused_ones_do_not_pile_up():
    clock = Wall(1, lambda fire, tick: 1.0)
    sources = Sources(3, clock)
    for tick in range(1, 50):
        for due in clock.to_start(tick - 1):
            assert sources.wants(due)
            sources.keep(due, [], None)
            clock.finished(due.version)
        sources.settle(MergeOutcome(refused=clock.version))
        assert not sources._held
    assert not Sources(None, clock).wants(due) and not Sources(None, clock).diagnosed(3)
