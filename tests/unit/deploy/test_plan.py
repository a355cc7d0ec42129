"""`plan`: its bytes against hand-computed numbers, its warnings, and the cadence it calls sustainable."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anchor_service.clock import Lockstep
from anchor_service.lag import agenda
from deploy.cli import app
from deploy.estimate.bytes import correction_bytes, head_bytes, tick_bytes
from deploy.estimate.memory import memory, peak
from deploy.estimate.parameters import count_parameters, parameters
from deploy.estimate.phases import Phases, first_lag, sustainable_cadence
from deploy.estimate.plan import Plan, load_for_planning, make_plan
from deploy.estimate.published_models import PUBLISHED
from deploy.estimate.tables import assumptions
from swarm.run_config import RunConfig
from tests.unit.test_imports import HEAVY, outside_world

QWEN = "qwen2.5-1.5b-gsm8k"
TINY = {  # 608 parameters a layer, 80 in the embedding, 8 in the norm
    "model_type": "qwen2",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
RUN = (
    "run.steps=5",
    "grpo.train_batch_size=4",
    "grpo.ppo_mini_batch_size=2",
    "grpo.group_size=4",
    "swarm.dp=2",
    "swarm.pp=2",
    "swarm.boundaries=[1]",
    "codec.rank=2",
    "codec.q_cadence=4",
    "anchor.delay_k=3",
    "anchor.cadence=2",
    "rollout.replicas=1",
    "snapshot.encoding=full",
    "links.prompt_tokens=3",
    "links.response_tokens=5",
)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def config(model: Path, *overrides: str) -> RunConfig:
    return load_for_planning("k5", [f"model.path={model}", *RUN, *overrides])


@cache
def plan(source: str, *overrides: str) -> Plan:
    return make_plan(load_for_planning(source, list(overrides)))


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"), [("Qwen/Qwen2.5-0.5B", 494_032_768), ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304)]
)
def test_published_shapes_give_the_published_number_of_parameters(name: str, total: int):
    assert count_parameters(PUBLISHED[name]).total == total


def test_sets_are_counted_without_a_look_at_their_rows():
    sets = "val.sets.a.task=jsonl:not-here.jsonl", "val.sets.a.params.prompt=x", "val.sets.b.samples=2"
    planned = load_for_planning("k5", ["val.size=8", *sets])
    assert {split: (one.count, one.samples) for split, one in planned.val.asked(1.0).items()} == {
        "val": (8, 1),
        "val/a": (8, 1),
        "val/b": (8, 2),
    }
    alone, several = (tick_bytes(c)["control"][0] for c in (load_for_planning("k5", ["val.size=8"]), planned))
    assert several > alone
    with pytest.raises(
        ValueError, match=r"^val\.size is 'all', and no data is read here: say how many with val\.size=N"
    ):
        tick_bytes(load_for_planning("k5", ["val.size=all"]))


def test_bytes_of_a_tiny_config_by_hand(tiny: Path):
    found = tick_bytes(config(tiny))
    assert parameters(config(tiny)).total == 1304
    tokens = 2 * 4 * (3 + 5)
    # the old log-probs of a step's second tick cross the boundary too; those of its first are the tick's own
    assert found["boundary_fwd"] == (1.5 * tokens * 2 * 4, 1.5 * tokens * 8 * 4)
    assert found["boundary_bwd"] == (tokens * 2 * 4, tokens * 8 * 4)
    # Q [8, 2] before ticks 2, 4 and 8 of 10: V on 2 replicas, Q to the second, Q on by each of them
    assert found["basis"] == (pytest.approx(0.3 * 64 * (2 + 1 + 2)), 0)
    assert found["grad_dp"] == (2 * 4 * (608 + 616),) * 2
    assert found["tied"] == (2 * 3 * 80 * 4,) * 2  # four copies of the embedding: both stages, both replicas
    # fires in ticks 4, 6, 8 and 10
    assert found["snapshot"] == (pytest.approx(0.4 * 1304 * 4), 0)
    assert found["correction"] == (pytest.approx(0.4 * 2 * (86 + 87)), 0)
    assert found["rollout_sync"] == (pytest.approx(6 * 1304 * 4 / 10),) * 2
    assert 0.4 * 8 * 5 * 28 / 8 < found["replay"][0] < 0.4 * 4 * 8 * (8 + 5)  # log-probs; all numbers at 4 bytes


def test_the_floor_has_no_anchor_bytes_and_one_replica_no_sums(tiny: Path):
    without = "merger.kind=none", "anchor.delay_k=5", "anchor.cadence=5"
    found = tick_bytes(config(tiny, *without, "swarm.dp=1", "swarm.pp=1"))
    assert {c for c, (sent, _) in found.items() if not sent} == {"grad_dp", "tied", "snapshot", "replay", "correction"}


def test_the_published_surface_has_the_published_ratio():
    found = plan(QWEN)
    channels = found.configured.channels
    y, dense = channels["boundary_fwd"]
    assert y / dense == pytest.approx(77 / 1536) == pytest.approx(0.0501, abs=5e-5)
    q = channels["basis"][0] / (dense + channels["boundary_bwd"][1])
    assert found.configured.bytes_ratio == pytest.approx(77 / 1536 + q)
    assert 0 < q < 1e-4


def test_on_the_tokens_of_the_field_notes_the_uncounted_broadcast_outweighs_the_dense_boundary():
    lengths = (
        "links.prompt_tokens=25",
        "links.response_tokens=50",
        "grpo.old_logprobs=rollout",
        "grpo.rollout_is=none",
    )
    schemes = {(s.name, s.cadence): s for s in plan(QWEN, *lengths).schemes}
    assert sum(schemes["bf16 M", 5].channels[c][1] for c in ("boundary_fwd", "boundary_bwd")) == pytest.approx(
        236e6, 1e-3
    )
    assert 5 < schemes["bf16 M", 5].circuit_ratio < 6 and 1.3 < schemes["bf16 M", 20].circuit_ratio < 1.6
    assert schemes["signs", 5].circuit_ratio < 0.5
    assert schemes["bf16 M", 5].sent("correction") == pytest.approx(16 * schemes["signs", 5].sent("correction"))


def test_ways_to_send_m_differ_in_nothing_but_m_and_the_snapshot(tiny: Path):
    found = make_plan(config(tiny, "anchor.cadence=4", "codec.q_cadence=4")).schemes
    assert [(s.cadence, s.name) for s in found] == [(c, w) for c in (4, 5, 20) for w in ("bf16 M", "signs")]
    bf16, signs = found[0].channels, found[1].channels
    assert {c for c in bf16 if bf16[c] != signs[c]} == {"correction", "snapshot"}
    assert bf16["correction"][0] / signs["correction"][0] == pytest.approx(2 * (688 + 696) / (86 + 87))


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("fire", [0.2, 1.0, 3.4, 9.0, 10.01])
def test_the_sustainable_cadence_is_the_smallest_at_which_no_fire_ever_waits(fire: float, workers: int):
    def keeps_up(cadence: int) -> bool:
        free = [0.0] * workers
        for number in range(400):
            start = float(number * cadence)
            if free[number % workers] > start + 1e-9:
                return False
            free[number % workers] = start + fire
        return True

    smallest = next(c for c in range(1, 100) if keeps_up(c))
    assert sustainable_cadence(fire, 0.0, 1.0, workers) == smallest


def test_m_bar_passes_through_all_workers_so_more_of_them_stop_helping():
    assert sustainable_cadence(fire=12.0, handover=5.0, tick=1.0, workers=2) == 6
    assert sustainable_cadence(fire=12.0, handover=5.0, tick=1.0, workers=100) == 5


@pytest.mark.parametrize("fire", [0.1, 1.0, 1.5, 4.0, 4.2])
def test_the_first_lag_is_the_smallest_delay_that_waits_for_nothing(fire: float):
    source = 17
    started = float(source)  # tick i takes [i-1, i): tick source+1, which offers the weights, begins here
    smallest = next(k for k in range(2, 100) if started + fire <= source + k - 1)
    assert first_lag(fire, 1.0) == smallest


def test_phases_add_up_to_the_tick_of_the_simulator(tiny: Path):
    phases = Phases(config(tiny))
    assert phases.tick_time(0.0).total == pytest.approx(sum(phases.tick(refresh=False)[:2]))
    assert phases.tick_time(1.0).total == pytest.approx(sum(phases.tick(refresh=True)[:2]))
    assert min(vars(phases.tick_time(0.5)).values()) >= 0


def test_slower_links_cost_time_where_bytes_cross_them():
    dense = "codec.gradient.kind=none"
    fast, slow = plan(QWEN, dense, "links.swarm_mbit=1e4"), plan(QWEN, dense, "links.swarm_mbit=10.0")
    assert fast.tick.compute == slow.tick.compute
    assert slow.tick.tied > 100 * fast.tick.tied and slow.tick.boundary > fast.tick.boundary
    assert slow.anchor.fire == fast.anchor.fire and slow.anchor.cadence <= fast.anchor.cadence


# --- memory --------------------------------------------------------------------------------------


def test_memory_of_a_worker_by_hand(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {p.name: p.bytes for p in memory(config(tiny), parameters(config(tiny))) if p.role == "worker stage 1"}
    assert parts["fp32 masters"] == parts["fp32 gradients"] == 4 * 696
    assert parts["Adam moments"] == 8 * 696 and parts["correction held"] == 696
    assert parts["scratch of norm and merge"] == 16 * (696 - 80)
    monkeypatch.setattr("merger.COMPILED_FROM", 696)  # as if that were many: two planes
    parts = {p.name: p.bytes for p in memory(config(tiny), parameters(config(tiny))) if p.role == "worker stage 1"}
    assert parts["correction held"] == 696 / 4
    assert "compute copy" not in parts and "bases of deltas" not in parts


def test_what_is_kept_for_fires_under_way_is_counted_by_the_lags_of_the_run(tiny: Path):
    def held(name: str, *overrides: str) -> float:
        parts = memory(config(tiny, *overrides), parameters(config(tiny)))
        return sum(p.bytes for p in parts if (p.role, p.name) == ("worker stage 1", name))

    pareto = ("anchor.lag.kind=pareto", "anchor.lag.mean=40", "run.steps=75")
    most = Lockstep(agenda(config(tiny, *pareto).anchor, 0, 150)).bound()
    assert most > 2 and held("gradients of source ticks", "merger.kind=delta", *pareto) == 4 * 696 * most
    assert held("gradients of source ticks", "merger.kind=delta") == 4 * 696 * 2  # a lag of 3, a fire every 2 ticks
    without = ("anchor.enabled=false", "merger.placebo=own")
    assert held("placebo", *without) == 696 * (1 + 4 * (1 + 2)) and held("placebo") == 0
    assert held("placebo", "anchor.enabled=false", "merger.placebo=random") == 696


def test_the_peak_counts_backward_and_merge_scratch_once(tiny: Path):
    parts = memory(config(tiny), parameters(config(tiny)))
    mine = [p for p in parts if p.role == "worker stage 0"]
    assert {p.during for p in mine} == {"always", "backward", "merge"}
    scratch = min(sum(p.bytes for p in mine if p.during == phase) for phase in ("backward", "merge"))
    assert peak(parts, "worker stage 0", "device") == sum(p.bytes for p in mine if p.where == "device") - scratch


def test_checkpointing_leaves_the_inputs_of_the_layers_and_one_layer_that_is_computed_again(tiny: Path):
    def kept(*overrides: str) -> dict[str, float]:
        parts = memory(config(tiny, *overrides), parameters(config(tiny)))
        return {p.role: p.bytes for p in parts if p.name == "activations"}

    plain, checked = kept("swarm.pp=1"), kept("swarm.pp=1", "swarm.activation_checkpointing=true")
    for role, bytes_ in plain.items():
        layers, tokens = TINY["num_hidden_layers"], 32 * (3 + 5)  # of a microbatch, in worker and anchor alike
        inputs = tokens * layers * 4 * TINY["hidden_size"]
        assert checked[role] == pytest.approx(bytes_ / layers + inputs) and checked[role] < bytes_


def test_the_anchor_holds_the_old_and_the_new_m_bar_and_the_floor_has_no_anchor():
    found = {p.name: p for p in plan(QWEN).parts if p.role == "anchor worker"}
    assert found["M̄, old and new"].bytes == 8 * 1_543_714_304 and found["M̄, old and new"].where == "host"
    assert not any(p.role == "anchor worker" for p in plan("dense").parts)


def test_vllm_holds_its_weights_and_a_cache_beside_the_plain_model(tiny: Path):
    def engine(*options: str) -> dict[str, float]:
        c = config(tiny, *options)
        return {p.name: p.bytes for p in memory(c, parameters(c)) if p.role == "engine"}

    plain, vllm = engine(), engine("rollout.engine=vllm", "rollout.kv_cache_gb=0.5")
    assert vllm["vLLM's weights"] == vllm["fp32 masters"] == plain["fp32 masters"] and "vLLM's weights" not in plain
    assert vllm["KV cache"] == 2**29 and engine("rollout.engine=vllm")["KV cache"] == 2**30


# --- warnings ------------------------------------------------------------------------------------

QUIET = (  # one stage, an anchor that keeps up, and so many tokens that the boundary and the activations are largest
    "swarm.pp=1",
    "links.anchor_mbit=1e5",
    "links.anchor_tokens_s=1e6",
    "grpo.group_size=64",
    "links.prompt_tokens=500",
    "links.response_tokens=500",
    "swarm.micro_batch_size=16",
)


def warned(found: Plan) -> set[str]:
    return {warning.split()[0] for warning in found.warnings}


def test_a_config_with_nothing_to_warn_of_gets_no_warning():
    assert plan(QWEN, *QUIET).warnings == []


@pytest.mark.parametrize(
    ("first", "overrides"),
    [
        ("tied", ("swarm.pp=2", "links.response_tokens=100", "codec.gradient.kind=none")),
        ("correction", ("anchor.payload=dense", "anchor.cadence=1")),
        ("snapshot", ("snapshot.encoding=full", "snapshot.dtype=float32", "anchor.cadence=1")),
        ("grad_dp", ("swarm.dp=2", "codec.gradient.kind=none")),
        ("anchor.cadence", ("links.anchor_tokens_s=10.0",)),
        ("anchor.delay_k", ("anchor.delay_k=1",)),
        ("2", ("anchor.workers=2",)),
        ("worker", ("swarm.pp=2", "links.response_tokens=900")),
    ],
)
def test_each_warning_comes_with_its_cause(first: str, overrides: tuple[str, ...]):
    assert first in warned(plan(QWEN, *QUIET, *overrides))


def test_memory_that_logits_dominate_is_named():
    found = plan(QWEN, *QUIET, "swarm.pp=2", "links.response_tokens=900")
    assert any("worker stage 1: the largest part of its memory is logits" in w for w in found.warnings)


def test_on_the_wall_clock_nothing_waits_so_nothing_is_said_of_waiting():
    found = plan(QWEN, "anchor.clock=wall", "links.anchor_tokens_s=10.0")
    assert not warned(found) & {"anchor.cadence", "anchor.delay_k"} and found.anchor.delay_k > 5


@pytest.mark.parametrize(
    ("layout", "most"),
    [
        ((), 0.05),
        (("swarm.dp=2",), 0.025),
        (("swarm.dp=8", "swarm.pp=4", "swarm.boundaries=[7, 14, 21]"), 0.02),
    ],
    ids=["1x2", "2x2", "8x4"],
)
def test_the_published_surface_sends_a_small_share_of_everything(layout: tuple[str, ...], most: float):
    """As the preset ships: everything over everything, each channel counted."""
    found = plan(QWEN, *layout).configured
    assert found.total_ratio < most
    assert {c for c, (sent, _) in found.channels.items() if not sent} <= {
        "grad_dp"
    }  # one replica has nobody to sum with


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_every_table_and_writes_the_numbers(tmp_path: Path):
    out = tmp_path / "plan.json"
    sets = "links.swarm_mbit=1000", "codec.gradient.kind=none"
    result = CliRunner().invoke(app, ["plan", QWEN, *(w for s in sets for w in ("--set", s)), "--json", str(out)])
    assert result.exit_code == 0, result.output
    for expected in ("boundary_fwd", "total_ratio", "signs", "anchor worker", "sustainable", "warning tied"):
        assert expected in result.output
    assert json.loads(out.read_text()) == json.loads(json.dumps(plan(QWEN, *sets).numbers()))


def test_what_a_run_may_not_send_is_said_where_it_is_counted(tiny: Path):
    """A merger that looks does not fetch what has no share: of two stages of 2^20 parameters each 32nd is looked at."""
    looks, signs = (make_plan(config(tiny, f"merger.kind={kind}")) for kind in ("calibrated", "signed_ema"))
    assert "Corrections are an upper bound" in assumptions(looks) and "upper bound" not in assumptions(signs)
    stages, whole, head = [1 << 20] * 2, (1 << 20) // 8, (1 << 15) // 8
    assert head_bytes(looks.config, stages) == [head] * 2 and head_bytes(signs.config, stages) == [0] * 2
    assert correction_bytes(looks.config, stages) == [whole + head] * 2
    assert correction_bytes(signs.config, stages) == [whole] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-preset"], "no preset"),
        ([QWEN, "--set", "swarm.boundaries=[28]"], "28 layers"),
        ([QWEN, "--set", "codec.rank=1537"], "1537"),
        ([QWEN, "--set", "anchor.cadense=3"], "cadence"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_one_line(arguments: list[str], message: str):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("file", ["deploy/estimate/plan.py", "deploy/estimate/tables.py", "deploy/cli.py"])
def test_planning_imports_neither_torch_nor_ray(file: str):
    assert not outside_world(file) & HEAVY
