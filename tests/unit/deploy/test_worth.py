"""Is an anchor worth its bytes? Agreements of synthetic gradients by theory, the share by the merger's rule, the file by its config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from codec.ledger import ANCHOR
from deploy.cli import app
from deploy.config import ConfigError, load
from deploy.estimate.bytes import tick_bytes
from deploy.estimate.plan import load_for_planning, make_plan
from deploy.estimate.worth import Measured, ProbeMismatch, Worth, prediction_in_words, settings_of
from deploy.probe.anchor_trial import agreements, measured, pieces_of
from tests.conftest import make_batch

N, BATCHES = 40_000, 8


def gradients(
    signal: float, codec: float, shared: float, seed: int = 0, n: int = N
) -> tuple[torch.Tensor, torch.Tensor]:
    """G and M of BATCHES mini-batches: `signal` and `codec` times one truth, unit noise; G has `shared` times its M's noise too."""
    g = torch.Generator().manual_seed(seed)
    truth, noise, own = (torch.randn(rows, n, generator=g) for rows in (1, BATCHES, BATCHES))
    return codec * truth + shared * noise + own, signal * truth + noise


def by_theory(signal: float, codec: float, shared: float) -> tuple[float, float]:
    """Of normal numbers that correlate by ρ a share 1 - arccos(ρ)/π has one sign."""
    own = (signal * codec + shared) / math.sqrt((signal**2 + 1) * (codec**2 + shared**2 + 1))
    other = signal**2 / (signal**2 + 1)
    f, a = (2 * (1 - math.acos(rho) / math.pi) - 1 for rho in (own, other))
    return f, a


@pytest.mark.parametrize(
    ("signal", "codec", "shared"), [(0.3, 0.3, 0.0), (0.5, 0.1, 1.0), (0.3, 0.0, 3.0), (0.0, 0.0, 3.0), (1.0, 2.0, 0.0)]
)
def test_agreements_are_those_of_the_correlation_and_no_m_meets_itself(signal: float, codec: float, shared: float):
    found = agreements(*gradients(signal, codec, shared))
    f, a = by_theory(signal, codec, shared)
    close = 4 / math.sqrt(N)
    assert found.compressed.value == pytest.approx(f, abs=close)
    assert found.anchor.value == pytest.approx(a, abs=close)
    assert (found.compressed.n, found.compressed.weight, found.anchor.n) == (BATCHES, BATCHES * N, BATCHES)


def test_each_batch_is_compared_with_each_other_one():
    compressed, dense = gradients(0.5, 0.5, 0.0)
    signs = dense.sign()
    pairs = [(signs[a] * signs[b]).mean().item() for a in range(BATCHES) for b in range(BATCHES) if a != b]
    assert agreements(compressed, dense).anchor.value == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


@pytest.mark.parametrize("signal", [0.0, 0.5])
def test_a_standard_error_is_how_far_one_probe_is_from_the_next(signal: float):
    """By jackknife that of pairs is the larger by √2 where there is no signal: batches that meet are counted twice."""
    drawn = (gradients(signal, signal, 0.0, seed, n=100) for seed in range(40))
    found = [measured(compressed[:5], dense[:5], samples=4) for compressed, dense in drawn]
    for name in ("f", "a"):
        values = torch.tensor([getattr(m, name) for m in found])
        errors = torch.tensor([getattr(m, f"{name}_error") for m in found])
        assert 0.75 < (errors.mean() / values.std()).item() < 1.9


def test_mini_batches_without_a_gradient_do_not_count():
    compressed, dense = gradients(0.3, 0.3, 0.0, n=2000)
    rest = measured(compressed[2:], dense[2:], 4)
    compressed[0], dense[1] = 0.0, 0.0
    assert measured(compressed, dense, 4) == rest and rest is not None and rest.batches == BATCHES - 2
    dense[2:6] = 0.0
    assert measured(compressed, dense, 4) is None


@pytest.mark.parametrize(
    ("group", "prompts", "batches", "size"), [(4, 2, 12, 4), (2, 2, 12, 4), (2, 8, 8, 6), (24, 8, 2, 24)]
)
def test_mini_batches_are_of_whole_groups_and_smaller_than_a_runs_where_answers_are_few(
    group: int, prompts: int, batches: int, size: int
):
    some = make_batch()
    answers = some.pick(np.arange(48) % len(some))
    config = load("k5", [f"grpo.group_size={group}", f"grpo.ppo_mini_batch_size={prompts}"])
    found = pieces_of(answers, config)
    assert [len(batch) for batch in found] == [size] * batches
    assert np.array_equal(found[1].advantages, answers.advantages[size : 2 * size])


# --- the share --------------------------------------------------------------------------------------


def seen(**changed: Any) -> Measured:
    numbers = {"f": 0.05, "f_error": 0.0, "a": 0.03, "a_error": 0.0}
    return Measured(batches=9, samples=64, coordinates=65_536, **numbers | changed)


def worth(*overrides: str, **changed: Any) -> Worth:
    return Worth(load_for_planning("k5", list(overrides)), seen(**changed))


@pytest.mark.parametrize("lag", [5, 20])
@pytest.mark.parametrize("agreed", [(0.02, 0.05), (1.0, 0.03), (-0.01, 0.02), (0.001, 0.02), (0.1, 0.0), (0.1, -0.2)])
def test_the_share_is_the_mergers_own_after_the_fires_of_the_run(lag: int, agreed: tuple[float, float]):
    """150 ticks: at {5, 5} 30 fires, merged from tick 5 on, at {20, 20} 7; the k-th started under k - 1 of them."""
    found = worth(f"anchor.delay_k={lag}", f"anchor.cadence={lag}", f=agreed[0], a=agreed[1])
    fires, tau = 150 // lag, 3 * lag
    earlier = sum(0.9**i for k in range(fires) for i in range(k))
    a = (20 * 0.03 + earlier * agreed[1]) / (20 + earlier)
    r = min(1, a / 0.015) / math.sqrt(1 / 3 + 2 / 3 * math.sin(math.pi / 2 * max(a, 0))) / (agreed[0] * tau)
    told = a > 0 and agreed[0] > 3 / 256 / math.sqrt(fires)
    by_hand = min(0.75, 12 / tau, r / (1 + r)) if told else 0.0
    assert (found.share, found.tau, found.bound) == pytest.approx((by_hand, tau, 12 / tau))


def test_the_range_is_of_agreements_a_standard_error_off():
    found = worth(f=0.1, f_error=0.02, a_error=0.02)
    low, high = worth(f=0.12, a=0.01).share, worth(f=0.08, a=0.05).share
    assert found.between == pytest.approx((low, high)) and low < found.share < high


def test_where_nothing_is_merged_it_is_that_of_a_calibrated_anchor():
    same = ["run.steps=20", "anchor.delay_k=5", "anchor.cadence=5"]
    without, there = (worth(*same, *other) for other in (["merger.kind=none"], ["merger.kind=calibrated"]))
    sent = tick_bytes(there.config)
    assert without.sent == there.sent == (sum(sent[name][0] for name in ANCHOR), sum(s for s, _ in sent.values()))
    assert without.share == there.share > 0


@pytest.mark.parametrize(
    ("overrides", "changed", "verdict", "says"),
    [
        ([], {}, 1, "expected to be worth its bytes"),
        (
            ["anchor.cadence=10"],
            {"f": 0.9},
            -1,
            "No difference is to be expected of the anchor, which may be harmful without the calibration",
        ),
        (
            ["merger.hold_cap=true", "anchor.cadence=10"],
            {"f": 0.9},
            0,
            "No difference is to be expected of the anchor: ",
        ),
        (["merger.dose=0.3"], {"f": 0.9}, 0, "No difference is to be expected of the anchor: "),
        (["anchor.delay_k=20", "anchor.cadence=20"], {"f": 0.05}, -1, "within the bound 0.2"),
        (["anchor.cadence=10"], {"a": -0.2}, -1, "a share of 0 of the step"),
        ([], {"f_error": 0.1}, 1, "the verdict may be the other one"),
    ],
)
def test_the_sentence(
    overrides: list[str], changed: dict[str, Any], verdict: int, says: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Worth, "sent", (1e6, 4e6))
    found = worth(*overrides, **changed)
    words = prediction_in_words(found)
    assert found.verdict == verdict and says in words and "1 MB of 4 MB (25\N{NO-BREAK SPACE}%) a tick" in words
    assert ("beyond the bound, without the calibration" in words) == (found.uncalibrated > found.bound)


# --- the file --------------------------------------------------------------------------------------


def test_plan_reads_what_a_probe_wrote_and_says_what_it_said(tmp_path: Path):
    """At another delay and cadence too: agreements are of gradients alone."""
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"worth": worth().numbers()}))
    result = CliRunner().invoke(app, ["plan", "k5", "--probe", str(file)])
    assert result.exit_code == 0, result.output
    assert " ".join(prediction_in_words(worth()).split()) in " ".join(result.output.split())
    later = ["anchor.delay_k=20", "anchor.cadence=20"]
    assert make_plan(load_for_planning("k5", later), probe=file).worth == worth(*later)


def test_without_a_probe_plan_names_the_command_that_makes_one():
    result = CliRunner().invoke(app, ["plan", "k5", "--set", "codec.rank=6"])
    assert "northstar probe k5 --set codec.rank=6 --json probe.json" in " ".join(result.output.split())
    assert "worth its bytes" not in CliRunner().invoke(app, ["plan", "floor"]).output


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["codec.rank=6"], r"codec\.rank is 4 there and 6 here"),
        (["codec.kind=transform", "codec.total_rate=0.05"], r"codec\.kind is 'powersgd' there and 'transform' here"),
        (["swarm.boundaries=[1]"], r"swarm\.boundaries is \[2\] there and \[1\] here"),
        (["anchor.beta_anc=0.9"], r"anchor\.beta_anc is 0\.5 there and 0\.9 here"),
    ],
)
def test_a_file_of_another_config_is_refused(tmp_path: Path, overrides: list[str], field: str):
    file = tmp_path / "probe.json"
    file.write_text(json.dumps({"worth": worth().numbers()}))
    with pytest.raises(ProbeMismatch, match=field):
        make_plan(load_for_planning("k5", overrides), probe=file)
    sets = [x for o in overrides for x in ("--set", o)]
    result = CliRunner().invoke(app, ["plan", "k5", *sets, "--probe", str(file)])
    assert result.exit_code == 2 and "probe this config" in result.output


def test_a_file_of_another_model_is_refused(tmp_path: Path):
    numbers = worth().numbers()
    numbers["of"]["model.path"] = "another"
    (tmp_path / "probe.json").write_text(json.dumps({"worth": numbers}))
    with pytest.raises(ProbeMismatch, match=r"model\.path is 'another' there and 'builtin:tiny' here"):
        make_plan(load_for_planning("k5", []), probe=tmp_path / "probe.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"worth": null}', '{"worth": {"of": {}, "measured": {}}}', '{"worth": {"of": 1, "measured": 2}}'],
)
def test_what_is_no_probes_file_is_refused(tmp_path: Path, text: str):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(ProbeMismatch, match="northstar probe … --json"):
        make_plan(load_for_planning("k5", []), probe=tmp_path / "probe.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_plan(load_for_planning("k5", []), probe=tmp_path / "none.json")


@pytest.mark.parametrize("value", [None, "0.1", math.nan, True])
def test_numbers_that_are_none_are_refused(tmp_path: Path, value: Any):
    numbers = worth().numbers()
    numbers["measured"]["a"] = value
    (tmp_path / "probe.json").write_text(json.dumps({"worth": numbers}))
    with pytest.raises(ProbeMismatch, match="'worth' is not there"):
        make_plan(load_for_planning("k5", []), probe=tmp_path / "probe.json")


def test_the_settings_of_a_probe_are_plain_json():
    for name in ("k5", "demo"):
        of = settings_of(load(name))
        assert json.loads(json.dumps(of)) == of and not any("gradient" in key for key in of)
