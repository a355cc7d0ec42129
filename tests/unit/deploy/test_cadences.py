"""The workers and bytes of a cadence, and the pair (cadence, replay) that `plan` recommends within a budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from codec.ledger import ANCHOR
from deploy.cli import app
from deploy.estimate import batches
from deploy.estimate.bytes import tick_bytes
from deploy.estimate.cadences import KNOWN, Affordable, affordable, anchor_bytes, fewest_workers
from deploy.estimate.phases import Phases, sustainable_cadence
from deploy.estimate.plan import load_for_planning, make_plan
from deploy.estimate.workload import tokens_per_tick
from swarm.run_config import RunConfig

SLOW = "links.anchor_tokens_s=500.0"
TICK_S = 1.5


def config(*overrides: str) -> RunConfig:
    return load_for_planning("k5", ["run.steps=20", *overrides])


def best(*overrides: str, budget: float | None = None) -> Affordable:
    anchor = make_plan(config(*overrides), budget).anchor
    assert anchor is not None
    return anchor.affordable


def keeps(workers: int, cadence: int) -> bool:
    fire = Phases(config(SLOW, f"anchor.workers={workers}", "anchor.replay=window")).fire_time(cadence)
    return sustainable_cadence(fire.total, fire.handover, TICK_S, workers) <= cadence


@pytest.mark.parametrize("cadence", [1, 2, 3, 5])
def test_the_workers_of_a_cadence_are_the_fewest_that_keep_it_up(cadence: int):
    found = fewest_workers(config(SLOW), cadence, TICK_S)
    assert found is not None and keeps(found, cadence) and not any(keeps(w, cadence) for w in range(1, found))


def test_where_m_bar_takes_too_long_from_one_to_the_next_no_number_of_workers_helps():
    assert fewest_workers(config(SLOW, "links.anchor_mbit=10.0"), 1, TICK_S) is None


@pytest.mark.parametrize("sustainable", [1, 3])
def test_the_best_cadence_is_the_smallest_that_workers_keep_and_the_budget_pays_for(sustainable: int):
    sent = {c: anchor_bytes(config(), c) for c in range(1, 41)}
    for budget in (1e4, 1e5, 3e5, 1e6, 1e8):
        found = affordable(config(), TICK_S, sustainable, budget).best
        assert found.cadence == min(c for c in sent if c >= sustainable and (sent[c] <= KNOWN * budget or c == 40))


@pytest.mark.parametrize("cadence", [1, 2, 5, 20])
def test_the_bytes_of_a_cadence_are_those_of_a_run_that_has_it(cadence: int):
    """But for weights that other corrections moved otherwise."""
    run = tick_bytes(config(f"anchor.cadence={cadence}", f"anchor.replay={'window' if cadence > 1 else 'tick'}"))
    assert anchor_bytes(config(), cadence) == pytest.approx(sum(run[channel][0] for channel in ANCHOR), rel=0.05)


def test_by_default_the_budget_is_what_is_sent_now():
    sent = tick_bytes(config("anchor.delay_k=20", "anchor.cadence=4"))
    found = best("anchor.delay_k=20", "anchor.cadence=4")
    assert found.budget == sum(sent[channel][0] for channel in ANCHOR)
    assert (found.best.cadence, found.best.replay) == (4, "window")


def test_one_tick_is_no_window_and_neither_is_one_whose_own_gradient_is_subtracted():
    assert [c.replay for c in best().asked] == ["tick", "window"]
    assert {c.replay for c in [*best("merger.kind=delta").asked, best("merger.kind=delta").best]} == {"tick"}


def test_weights_of_the_engines_are_there_at_the_end_of_a_step_only():
    found = best("anchor.weights=shared", "anchor.delay_k=6", "anchor.cadence=4", SLOW, budget=1e5)
    assert [c.cadence for c in found.asked] == [2] and found.best.cadence % 2 == 0


def test_a_window_costs_about_the_bytes_of_a_mini_batch_and_at_cadence_one_just_those():
    for cadence, most in ((1, 1), (5, 1.05), (20, 1.15)):
        given = f"anchor.cadence={cadence}", "anchor.delay_k=20"
        tick, window = (tick_bytes(config(*given, f"anchor.replay={r}"))["replay"][0] for r in ("tick", "window"))
        assert tick <= window <= most * tick


def test_of_a_long_window_some_ticks_stand_for_all(monkeypatch: pytest.MonkeyPatch):
    c = config("anchor.replay=window", "grpo.train_batch_size=128", "grpo.ppo_mini_batch_size=64")
    whole = batches.replay_bytes(c, 40)
    batches._replay.cache_clear()
    monkeypatch.setattr(batches, "MOST_TOKENS", 8 * tokens_per_tick(c))
    assert batches.replay_bytes(c, 40) == pytest.approx(whole, rel=0.02)
    batches._replay.cache_clear()


def test_the_command_takes_a_budget_and_says_the_pair(tmp_path: Path):
    out = tmp_path / "plan.json"
    found = CliRunner().invoke(app, ["plan", "k5", "--anchor-bytes", "1.0", "--json", str(out)], env={"COLUMNS": "160"})
    assert found.exit_code == 0, found.output
    assert "best within 1.00 MB a tick" in found.output and "cadence 2, replay window" in found.output
    numbers = json.loads(out.read_text())["anchor"]["affordable"]
    assert (numbers["budget"], numbers["best"]["cadence"]) == (1e6, 2)
