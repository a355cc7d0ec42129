"""The simulator: the schedule is the run's own, and time obeys laws that need no measurement."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from anchor_service.lag import agenda, read_trace
from deploy.cli import app
from deploy.config import load
from deploy.estimate.phases import Phases
from deploy.estimate.simulate import simulate
from deploy.estimate.simulation import Simulation, simulation_table, write_simulation
from deploy.estimate.timing import Durations, pipeline_ends, rounds
from swarm.run_config import RunConfig
from swarm.schedule import schedule

ROOT = Path(__file__).parents[3]
FAST_ANCHOR = ["links.anchor_tokens_s=1e12", "links.anchor_mbit=1e9", "links.anchor_latency_ms=0.0", "links.jitter=0.0"]
WALL = ["anchor.clock=wall", *FAST_ANCHOR]


def sim(*sets: str, preset: str = "demo", ticks: int = 200) -> Simulation:
    return simulate(load(preset, list(sets)), ticks)


def pairs(found: Simulation) -> list[tuple[int, int | None]]:
    return [(due.source_tick, due.first_tick) for due in found.corrections]


# --- lockstep ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [[], ["links.anchor_tokens_s=20.0"], ["links.anchor_mbit=0.05"]])
@pytest.mark.parametrize(("delay_k", "cadence"), [(1, 1), (5, 5), (7, 3), (3, 7), (20, 20), (20, 5)])
def test_lockstep_merges_the_agenda_however_slow_the_anchor_is(delay_k: int, cadence: int, slow: list[str]):
    config = load("demo", [f"anchor.delay_k={delay_k}", f"anchor.cadence={cadence}", *slow])
    expected = agenda(config.anchor, 0, 120)
    assert pairs(simulate(config, 120)) == [(d.source_tick, d.first_tick) for d in expected]


@pytest.mark.parametrize("workers", [1, 3])
def test_lockstep_merges_the_agenda_of_a_random_lag_too(workers: int):
    lag = 'anchor.lag={kind="lognormal", mean=7.0, sigma=0.7}'
    config = load("demo", [lag, "anchor.cadence=2", f"anchor.workers={workers}"])
    assert simulate(config, 120).corrections == agenda(config.anchor, 0, 120)


def test_a_slow_anchor_makes_a_lockstep_swarm_wait_and_is_named():
    fast, slow = sim(), sim("links.anchor_tokens_s=20.0")
    assert slow.seconds > 2 * fast.seconds
    assert slow.bottleneck == "anchor compute" and fast.bottleneck != "anchor compute"
    thin = sim("links.anchor_mbit=0.5")
    assert thin.critical["anchor link"] > 3 * fast.critical["anchor link"]
    assert slow.anchor_utilisation > 0.9


def test_ages_count_from_the_first_merge():
    found = sim("anchor.delay_k=3", "anchor.cadence=4", ticks=20)
    assert found.lags == [3] * 5 and found.ages == [0, 1, 2, 3] * 4 + [0]


# --- wall --------------------------------------------------------------------------------------


def test_an_anchor_that_costs_nothing_is_held_by_all_ranks_in_the_next_tick():
    """Offered before tick s+1, found done before tick s+2, held by all before that tick merges: lag 2."""
    found = sim(*WALL)
    assert set(found.lags) == {2}
    assert all(first == source + 2 for source, first in pairs(found))


def test_a_correction_on_its_way_is_not_merged_before_the_last_rank_holds_it():
    """Pull and delivery of three tick times each; some of it passes while the engines wait for their weights."""
    early = sim(*WALL)
    late = sim(*WALL, f"links.anchor_latency_ms={3000 * np.mean(early.tick_seconds)}")
    assert min(late.lags) > max(early.lags) and max(late.lags) <= 2 + 6


def test_lag_grows_with_the_time_that_the_anchor_needs():
    passes = ["grpo.old_logprobs=trainer", "grpo.rollout_is=token"]
    config = load("demo", ["anchor.clock=wall", "links.jitter=0.0", "val.size=1", *passes])
    means = []
    for tokens_s in (200.0, 100.0, 50.0, 25.0):
        links = config.links.model_copy(update={"anchor_tokens_s": tokens_s})
        means.append(np.mean(simulate(config.model_copy(update={"links": links}), 600).lags))
    grown = np.diff(means)
    assert grown[1:] / grown[:-1] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("mean", [8.0, 16.0])
def test_a_lag_model_slows_the_anchor_to_about_that_many_ticks(mean: float):
    engines = ["links.engine_tokens_s=1e9", "val.size=1", "links.swarm_mbit=1.0"]
    found = sim(*WALL, f'anchor.lag={{kind="uniform", low={mean}, high={mean}}}', *engines, ticks=600)
    assert mean <= np.median(found.lags) <= mean + 3


def test_in_an_outage_nothing_starts():
    found = sim(*WALL, 'anchor.lag={kind="outage", lag=1.0, every=50, length=20}')
    assert {source % 50 for source, _ in pairs(found)} <= set(range(30))


def test_several_workers_merge_more_often():
    slow = ["anchor.clock=wall", "links.anchor_tokens_s=200.0"]
    one, three = sim(*slow), sim(*slow, "anchor.workers=3")
    assert len(three.lags) > 1.5 * len(one.lags)  # not 3: fires that are done in one tick pass each other over


def test_a_correction_beyond_max_lag_is_refused():
    slow = ["anchor.clock=wall", "links.anchor_tokens_s=200.0"]
    assert max(sim(*slow).lags) > 3
    refused = sim(*slow, "anchor.max_lag=3")
    assert not refused.lags and refused.corrections  # sent for nothing, and recorded as never merged
    assert all(due.first_tick is None for due in refused.corrections)


# --- laws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["lockstep", "wall"])
def test_same_seed_same_result_and_another_seed_another(clock: str):
    sets = [f"anchor.clock={clock}", 'anchor.lag={kind="lognormal"}']
    assert sim(*sets) == sim(*sets)
    assert sim(*sets).tick_seconds != sim(*sets, "run.seed=1").tick_seconds


@pytest.mark.parametrize("clock", ["lockstep", "wall"])
@pytest.mark.parametrize("key", ["swarm_mbit", "anchor_mbit"])
def test_doubling_bandwidth_never_slows(key: str, clock: str):
    seconds = [sim(f"links.{key}={2.0**n}", f"anchor.clock={clock}", ticks=60).seconds for n in range(-3, 10)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 1.5 * seconds[-1]


def test_time_is_spent_somewhere_and_only_once():
    for sets in ([], ["links.anchor_tokens_s=50.0", "anchor.workers=2"], ["anchor.clock=wall"]):
        found = sim(*sets)
        assert sum(found.critical.values()) == pytest.approx(found.seconds)
        assert 0 < found.swarm_utilisation < 1 and 0 < found.anchor_utilisation < 1


def test_without_a_merger_the_anchor_is_not_asked():
    found = sim(preset="floor")
    assert found.started == 0 and not found.ages and found.summary()["lag"] is None


@pytest.mark.parametrize("pp", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_vectorised_pipeline_is_the_schedule_stage_by_stage(pp: int, count: int):
    """Against one replica, one operation after the other, each as soon as it can."""
    rng = np.random.default_rng(pp * count)
    forward, backward = rng.random((2, pp, count))
    up, down = rng.random((2, pp - 1, count, 3))
    found = pipeline_ends(rounds(pp, count), forward, backward, up, down, 0.3)
    for d in range(3):
        orders = [deque(schedule(p, pp, count)) for p in range(pp)]
        free, wires, arrived = [0.0] * pp, {}, {}
        while any(orders):
            for p, order in enumerate(orders):
                while order:
                    step, i = order[0]
                    needs = p > 0 if step == "F" else p < pp - 1
                    if needs and (step, p, i) not in arrived:
                        break
                    order.popleft()
                    cost = forward[p, i] if step == "F" else backward[p, i]
                    free[p] = max(free[p], arrived.get((step, p, i), 0.0)) + cost
                    to, wire = (
                        (p + 1, up[p, i, d] if p < pp - 1 else 0)
                        if step == "F"
                        else (p - 1, down[p - 1, i, d] if p else 0)
                    )
                    if 0 <= to < pp:
                        wires[step, p] = max(wires.get((step, p), 0.0), free[p]) + wire
                        arrived[step, to, i] = wires[step, p] + 0.3
        np.testing.assert_allclose(found[:, d], free, rtol=1e-12)


def test_a_ring_of_two_moves_its_bytes_once():
    config = load("demo", ["links.jitter=0.0", "links.swarm_mbit=8.0", "links.swarm_latency_ms=0.0"])
    durations = Durations(config, np.random.default_rng(0))
    np.testing.assert_allclose(durations._ring(np.array([1e6]), np.ones(1), 1), [1.0])  # 2·(2-1)/2 · 1 MB at 1 MB/s


# --- engines that sample ahead -----------------------------------------------------------------

AHEAD = ["grpo.old_logprobs=tick", "grpo.rollout_is=token", "links.jitter=0.0", "val.every=1000"]
SPEEDS = {  # tokens of an engine a second: samples take much less, as much, and much more time than the rest of a step
    "fast": "links.engine_tokens_s=20000.0",
    "even": "links.engine_tokens_s=1000.0",
    "slow": "links.engine_tokens_s=200.0",
    "thin": "links.anchor_mbit=0.5",
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("staleness", [0, 1, 2, 6])
def test_a_step_of_the_plan_is_one_of_the_simulator_whatever_overlaps(staleness: int, speed: str):
    """Two models of the same queue: a closed formula, and events on a clock, in the long run."""
    config = load("dense", [*AHEAD, SPEEDS[speed], f"rollout.max_staleness={staleness}"])
    phases = Phases(config)
    planned = phases.step_time(phases.tick_time(refreshes=0.0))
    short, long = (simulate(config, ticks).seconds for ticks in (100, 340))
    assert (long - short) / 120 == pytest.approx(planned.total, rel=1e-3)
    assert planned.overlap <= 0 and (staleness > 0 or planned.overlap == 0)


@pytest.mark.parametrize("clock", ["lockstep", "wall"])
@pytest.mark.parametrize("speed", SPEEDS)
def test_engines_that_sample_ahead_never_make_a_run_slower(speed: str, clock: str):
    sets = [*AHEAD, SPEEDS[speed], f"anchor.clock={clock}"]
    seconds = [sim(*sets, f"rollout.max_staleness={s}", ticks=60).seconds for s in (0, 1, 2, 4, 100)]
    assert seconds == sorted(seconds, reverse=True) and seconds[1] < seconds[0]
    found = sim(*sets, "rollout.max_staleness=2", ticks=60)
    assert sum(found.critical.values()) == pytest.approx(found.seconds)


def test_samples_that_are_there_in_time_are_not_waited_for():
    sets = [*AHEAD, SPEEDS["even"], "val.size=1"]
    today, ahead = sim(*sets, "rollout.max_staleness=0"), sim(*sets, "rollout.max_staleness=3")
    assert ahead.critical["engines"] < 0.05 * today.critical["engines"]
    assert ahead.critical["swarm compute"] == pytest.approx(today.critical["swarm compute"])


# --- what comes out ----------------------------------------------------------------------------


def test_the_folder_replays_as_a_trace(tmp_path: Path):
    found = sim("anchor.clock=wall", 'anchor.lag={kind="lognormal", mean=6.0}', "anchor.workers=2")
    write_simulation(found, tmp_path)
    trace = tmp_path / "corrections.csv"
    assert read_trace(str(trace)) == found.corrections
    facts = json.loads((tmp_path / "simulation.json").read_text())
    assert facts["lag"]["mean"] == pytest.approx(np.mean(found.lags))
    assert sum(facts["critical_share"].values()) == pytest.approx(1)
    assert (tmp_path / "lag.png").stat().st_size > 1000
    again = sim(f'anchor.lag={{kind="trace", path="{trace}"}}', "anchor.workers=2")
    assert again.corrections == found.corrections


def test_the_command_prints_a_table_and_says_what_is_wrong(tmp_path: Path):
    runner = CliRunner()
    done = runner.invoke(app, ["simulate", "demo", "--ticks", "20", "--out", str(tmp_path / "s")])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["corrections.csv", "lag.png", "simulation.json"]
    assert runner.invoke(app, ["simulate", "demo", "--set", "links.jiter=0.5"]).exit_code == 2
    assert simulation_table(sim(ticks=10)).row_count > 10


def test_no_torch_and_no_ray_are_imported():
    code = "import sys, deploy.estimate.simulate as s; from deploy.config import load; s.simulate(load('k5'), 10); "
    code += "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def large(tmp_path: Path, **sections: dict) -> RunConfig:
    """2,500 replicas of 4 stages of a model of 1.5B parameters."""
    shape = dict(
        model_type="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        use_sliding_window=False,
    )
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return RunConfig.model_validate(
        {
            "run": {"steps": 500},
            "model": {"path": str(tmp_path), "dtype": "bfloat16"},
            "grpo": {"train_batch_size": 2500, "ppo_mini_batch_size": 1250, "group_size": 8},
            "swarm": {"dp": 2500, "pp": 4, "boundaries": [7, 14, 21], "micro_batch_size": 1},
            "codec": {"kind": "powersgd", "rank": 77},
            "anchor": {"clock": "wall", "lag": {"kind": "lognormal", "mean": 6.0}},
            "links": {"anchor_tokens_s": 1e6},
        }
        | sections
    )


@pytest.mark.slow
def test_ticks_of_ten_thousand_workers_take_no_longer_in_a_longer_run(tmp_path: Path):
    """A thousand of them, a minute of a core."""
    config, seconds = large(tmp_path), dict[int, float]()
    for ticks in (100, 1000):
        start = time.process_time()
        found = simulate(config, ticks)
        seconds[ticks] = time.process_time() - start
        assert (found.workers, found.ticks) == (10_000, ticks) and found.lags
    assert seconds[1000] < 15 * seconds[100]


def test_ten_thousand_workers_take_ten_ticks(tmp_path: Path):
    found = simulate(large(tmp_path), 10)
    assert found.workers == 10_000 and len(found.tick_seconds) == 10
    # both rings and the pipeline are in it: 2·2499 latencies of 20 ms at least
    assert min(found.tick_seconds) > 2 * 2499 * 0.02
