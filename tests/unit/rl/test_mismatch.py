"""The trainer's log-probs against the engine's: sums over any split, estimators against the exact KL."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from rl import mismatch
from swarm.messages import Report
from swarm.telemetry import combine

P = torch.tensor([4, 6, 1, 5], dtype=torch.float64) / 16  # sampled from
Q = torch.tensor([5, 2, 8, 1], dtype=torch.float64) / 16


def pair(n: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = -torch.rand(n, generator=generator) * 5
    return reference, reference + 0.7 * torch.randn(n, generator=generator)


def settled(reference: torch.Tensor, trainer: torch.Tensor) -> dict[str, float]:
    return mismatch.metrics({name: value.item() for name, value in mismatch.sums(reference, trainer).items()})


def test_every_metric_is_what_a_loop_over_the_tokens_gives():
    reference, trainer = pair()
    a, b = reference.double().tolist(), trainer.double().tolist()
    ratios = [math.exp(y - x) for x, y in zip(a, b)]
    expected = {
        "codec/logprob_kl": statistics.fmean(x - y for x, y in zip(a, b)),
        "codec/logprob_k3": statistics.fmean(r - 1 - math.log(r) for r in ratios),
        "codec/logprob_corr": statistics.correlation(a, b),
        "codec/ratio_outside_1.2": statistics.fmean(not 1 / 1.2 <= r <= 1.2 for r in ratios),
        "codec/ratio_outside_2": statistics.fmean(not 1 / 2 <= r <= 2 for r in ratios),
        "codec/ratio_outside_5": statistics.fmean(not 1 / 5 <= r <= 5 for r in ratios),
        "rollout_corr/kl": statistics.fmean(x - y for x, y in zip(a, b)),
        "training/rollout_probs_diff_mean": statistics.fmean(abs(math.exp(y) - math.exp(x)) for x, y in zip(a, b)),
    }
    assert settled(reference, trainer) == pytest.approx(expected, rel=1e-9)
    assert tuple(expected) == mismatch.NAMES and 0 < expected["codec/ratio_outside_5"] < 0.1


def test_both_estimators_have_the_exact_kl_as_their_mean():
    """Every token as often as p says: 4, 6, 1 and 5 times of 16."""
    drawn = torch.repeat_interleave(torch.arange(4), (16 * P).long())
    found = settled(P.log()[drawn], Q.log()[drawn])
    exact = (P * (P / Q).log()).sum().item()
    assert found["codec/logprob_kl"] == pytest.approx(exact, rel=1e-12)
    assert found["codec/logprob_k3"] == pytest.approx(exact, rel=1e-12)  # Σ q = 1, so its other terms cancel


def test_one_policy_has_no_kl_and_full_correlation():
    reference, _ = pair()
    found = settled(reference, reference)
    assert found.pop("codec/logprob_corr") == pytest.approx(1.0, abs=1e-12)
    assert set(found.values()) == {0.0}


def test_log_probs_that_do_not_vary_are_no_reason_to_divide_by_zero():
    certain = torch.zeros(10)
    assert settled(certain, certain)["codec/logprob_corr"] == 1.0
    assert settled(certain, -torch.rand(10))["codec/logprob_corr"] == 1.0


def test_a_token_that_the_trainer_excludes_gives_no_infinite_k3():
    found = settled(torch.tensor([-100.0, -1.0]), torch.tensor([-1.0, -100.0]))
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("tokens", [500, 1, 12345])
def test_ranks_and_microbatches_add_up_whatever_the_telemetry_divides_by(tokens: int):
    reference, trainer = pair()

    def report(*parts: slice) -> Report:
        sums: dict[str, float] = {"actor/pg_loss": 3.0}
        for part in parts:
            for name, value in mismatch.sums(reference[part], trainer[part]).items():
                sums[name] = sums.get(name, 0.0) + value.item()
        return Report(sums, {}, {}, {})

    first_stage = Report({}, {}, {}, {})
    reports = [first_stage, report(slice(0, 7), slice(7, 300)), report(slice(300, 500))]
    metrics, _ = combine(reports, tokens)
    assert metrics == pytest.approx(settled(reference, trainer) | {"actor/pg_loss": 6.0 / tokens}, rel=1e-9)


def test_where_nothing_was_compared_nothing_is_said():
    assert mismatch.metrics({"actor/pg_loss": 1.0}) == {"actor/pg_loss": 1.0}


def test_without_a_codec_the_same_is_measured_under_other_names():
    """Of parts of a batch, however it was split; most engines were not asked to compare."""
    reference, trainer = pair()
    parts = [
        {name: value.item() for name, value in mismatch.sums(reference[part], trainer[part]).items()}
        for part in (slice(0, 100), slice(100, 500))
    ]
    found, whole = mismatch.dense_metrics(parts), settled(reference, trainer)
    assert tuple(found) == mismatch.DENSE
    assert list(found.values()) == pytest.approx([whole[name] for name in mismatch.CODEC], rel=1e-9)
    assert mismatch.dense_metrics([{}, {}]) == {}
