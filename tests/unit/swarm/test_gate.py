"""The launch gate: what was measured in, verdict out."""

from __future__ import annotations

import pickle

import pytest

from anchor_service.config import AnchorConfig
from anchor_service.errors import NotFinite
from codec.config import CodecConfig
from merger.config import MergerConfig
from rl.config import RolloutConfig
from swarm.gate import EngineGate, EngineMismatch, LaunchGate, PolicyChanged, capped_share


def gate(max_kl: float | None = None, kind: str = "powersgd") -> LaunchGate:
    return LaunchGate(CodecConfig(kind=kind, rank=4, max_kl=max_kl))


def test_the_random_first_basis_is_not_judged_and_ticks_without_a_measurement_neither():
    found = gate(max_kl=0.1)
    assert found.judge(9.0, 0) is None and found.judge(9.0, 1) is None
    assert found.judge(None, 2) is None
    with pytest.raises(PolicyChanged):
        found.judge(9.0, 2)


def test_a_refusal_names_the_value_the_key_and_the_command_that_helps():
    with pytest.raises(PolicyChanged, match=r"0\.25 nats.*codec\.max_kl 0\.1.*northstar probe") as caught:
        gate(max_kl=0.1).judge(0.25, 2)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_without_a_limit_it_warns_once_and_only_above_the_comfort_of_ratio_clipping():
    found = gate()
    assert found.judge(0.5, 4) == 0.5
    assert found.judge(0.5, 6) is None
    assert gate().judge(0.0199, 2) is None


def test_a_limit_that_is_kept_is_a_choice_and_no_warning():
    assert gate(max_kl=0.5).judge(0.4, 2) is None


def test_it_judges_once():
    found = gate(max_kl=0.1)
    assert found.judge(0.01, 2) is None
    assert found.judge(9.0, 4) is None


@pytest.mark.parametrize("max_kl", [None, 0.1])
def test_without_a_codec_there_is_nothing_to_judge(max_kl: float | None):
    assert gate(max_kl, kind="none").judge(9.0, 2) is None


# --- the engine -----------------------------------------------------------------------------------


def engine_gate(max_kl: float | None = None) -> EngineGate:
    return EngineGate(RolloutConfig(max_mismatch_kl=max_kl))


def test_an_engine_far_from_the_model_is_refused_at_the_first_measurement_with_the_key():
    found = engine_gate(max_kl=0.01)
    assert found.judge(None) is None
    with pytest.raises(EngineMismatch, match=r"0\.25 nats.*rollout\.max_mismatch_kl 0\.01") as caught:
        found.judge(0.25)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert found.judge(9.0) is None  # once


def test_an_engine_without_a_limit_is_remarked_on_above_the_comfort_of_ratio_clipping():
    assert engine_gate().judge(0.5) == 0.5
    assert engine_gate().judge(0.0199) is None
    assert engine_gate(max_kl=0.5).judge(0.4) is None


def test_an_engine_whose_log_probs_are_no_numbers_does_not_pass():
    for max_kl in (0.1, None):
        with pytest.raises(NotFinite, match=r"rollout_corr/dense_k3 is nan.*model\.path"):
            engine_gate(max_kl=max_kl).judge(float("nan"))


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        ({"hold_cap": True}, 0.75),
        ({"hold_cap": True, "dose": 0.2}, None),
        ({"hold_cap": True, "dose": 0.5, "alpha": 0.0}, 0.5),
        ({"hold_cap": True, "cap": 48.0}, None),
        ({}, None),
    ],
)
def test_a_share_beyond_the_cap_is_told_where_the_cap_cuts_it(config: dict[str, float], asked: float | None):
    found = capped_share(AnchorConfig(cadence=20), MergerConfig(**config))
    assert (found and found["share"]) == asked
    if found:
        assert found["tau"] == 60 and found["cap"] == pytest.approx(12 / 60)
        assert "merger.hold_cap keeps it to 0.2 " in found["reason"] and f"asks for {asked:g}" in found["reason"]
        assert capped_share(AnchorConfig(cadence=20, enabled=False), MergerConfig(**config)) is None
        assert capped_share(AnchorConfig(cadence=20, enabled=False), MergerConfig(**config, placebo="own")) == found
