"""A setting that the chosen kinds do not read is refused where the user gave it, and dropped where a preset did."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.cluster.sweep_runs import planned_runs
from deploy.config import load, to_toml
from deploy.resume import check_resumes
from deploy.unread import READERS
from experiments.sweep import SweepError, read_sweep
from swarm.run_config import RunConfig

NO_ANCHOR = "anchor.enabled=false merger.kind=none"
PLACEBO = "anchor.enabled=false merger.placebo=random"
UNREAD = {  # a setting that does nothing: what was chosen beside it, and what reads it
    "codec.rank=100000": (
        "codec.kind=transform",
        "codec.kind 'powersgd' or 'random_k' reads it",
        "set codec.kind=powersgd",
    ),
    "codec.rank=8": ("codec.kind=none", "codec.kind 'powersgd' or 'random_k' reads it", "set codec.kind=powersgd"),
    "codec.rank_ratio=0.5": ("codec.kind=transform", "codec.kind 'transform'", "set codec.kind=powersgd"),
    "codec.backward_basis=own": ("codec.kind=transform", "codec.kind 'transform'", "set codec.kind=powersgd"),
    "codec.total_rate=0.1": ("", "codec.kind 'powersgd': codec.kind 'transform' reads it", "set codec.kind=transform"),
    "codec.rate=0.1": ("codec.backward_rate=0.1", "codec.kind 'transform' reads it", "set codec.kind=transform"),
    "codec.backward_rate=0.1": ("codec.rate=0.1", "codec.kind 'transform' reads it", "set codec.kind=transform"),
    "codec.coder=fixed": ("codec.kind=none", "codec.kind 'none'", "set codec.kind=transform"),
    "codec.dither=true": ("", "codec.kind 'powersgd'", "set codec.kind=transform"),
    "codec.side_share=0.2": ("", "codec.kind 'powersgd'", "set codec.kind=transform"),
    "codec.sensitivity=0.2": ("", "codec.kind 'powersgd'", "set codec.kind=transform"),
    "codec.q_cadence=3": ("codec.kind=none", "codec.kind 'none'", "'powersgd' or 'transform' reads it"),
    "codec.kind=powersgd": ("codec.rank=4 swarm.boundaries=[]", "swarm.boundaries []", "set swarm.boundaries=[2]"),
    "codec.first_token=exact": ("swarm.boundaries=[]", "swarm.boundaries []", "set swarm.boundaries=[2]"),
    "codec.share_prefixes=true": ("swarm.boundaries=[]", "swarm.boundaries []", "set swarm.boundaries=[2]"),
    "codec.gradient.kind=powersgd": ("", "swarm.dp 1", "set swarm.dp=2"),
    "codec.gradient.bits=4.0": ("swarm.dp=2", "codec.gradient.kind 'none'", "'powersgd' or 'sparse' reads it"),
    "codec.gradient.rank=2": ("swarm.dp=2", "codec.gradient.kind 'none'", "set codec.gradient.kind=powersgd"),
    "merger.alpha=0.5": ("merger.kind=delta", "merger.kind 'signed_ema' reads it", "set merger.kind=signed_ema"),
    "merger.dose=0.5": (NO_ANCHOR, "merger.kind 'none'", "'signed_ema' or 'delta' reads it"),
    "merger.spend=once": ("", "merger.kind 'signed_ema'", "set merger.kind=delta"),
    "merger.hold_cap=true": ("merger.kind=calibrated", "merger.kind 'calibrated'", "set merger.kind=signed_ema"),
    "merger.cap=1": ("", "merger.kind 'signed_ema'", "or merger.hold_cap=true"),
    "merger.prior=0.1": ("", "merger.kind 'signed_ema'", "set merger.kind=calibrated"),
    "merger.age_decay=0.9": (NO_ANCHOR, "merger.kind 'none'", "set merger.kind=signed_ema"),
    "merger.adaptive_lambda_mode=ratio": (NO_ANCHOR, "merger.kind 'none'", "set merger.kind=signed_ema"),
    "merger.lambda_cap=0.5": ("", "merger.adaptive_lambda_mode 'none'", "set merger.adaptive_lambda_mode=ratio"),
    "anchor.delay_k=20": (NO_ANCHOR, "anchor.enabled false", "set anchor.enabled=true and merger.kind=signed_ema"),
    "anchor.delay_k=9": ("anchor.lag.kind=uniform", "anchor.lag.kind 'uniform'", "set anchor.lag.kind=fixed"),
    "anchor.cadence=20": (f"{NO_ANCHOR} codec.q_cadence=5", "anchor.enabled false", "no codec.q_cadence"),
    "anchor.cadence=9": ("anchor.clock=wall codec.q_cadence=5", "anchor.clock 'wall'", "set anchor.clock=lockstep"),
    "anchor.beta_anc=0.1": (PLACEBO, "anchor.enabled false", "or merger.placebo=own"),
    "anchor.clock=wall": (NO_ANCHOR, "anchor.enabled false", "or merger.placebo=own"),
    "anchor.lag.kind=pareto": (NO_ANCHOR, "anchor.enabled false", "set anchor.enabled=true"),
    "anchor.max_lag=9": (PLACEBO, "anchor.enabled false", "set anchor.enabled=true"),
    "anchor.max_age=9": ("merger.kind=none", "merger.kind 'none'", "set merger.kind=signed_ema"),
    "anchor.workers=2": (NO_ANCHOR, "anchor.enabled false", "set anchor.enabled=true"),
    "anchor.weights=shared": (NO_ANCHOR, "anchor.enabled false", "set anchor.enabled=true"),
    "anchor.replay_fraction=0.5": ("merger.kind=none", "merger.kind 'none'", "set merger.kind=signed_ema"),
    "anchor.replay=window": ("merger.kind=none", "merger.kind 'none'", "set merger.kind=signed_ema"),
    "anchor.payload=dense": ("merger.kind=delta", "merger.kind 'delta'", "set merger.kind=signed_ema"),
    "anchor.device=cuda": (NO_ANCHOR, "anchor.enabled false", "or diagnostics.every=7"),
    "anchor.placement=colocated": (
        f"{NO_ANCHOR} anchor.device=cuda swarm.device=cuda",
        "anchor.enabled false",
        "or diagnostics.every=7",
    ),
    "anchor.micro_batch_size=4": (NO_ANCHOR, "anchor.enabled false", "or diagnostics.every=7"),
    "anchor.slowdown=2.0": (NO_ANCHOR, "anchor.enabled false", "set anchor.enabled=true"),
    "anchor.norm_bound=5.0": ("", "anchor.clock 'lockstep'", "set anchor.clock=wall"),
    "anchor.timeout_s=9.0": (NO_ANCHOR, "anchor.enabled false", "or diagnostics.every=7"),
    "snapshot.rate=0.05": ("snapshot.encoding=full", "snapshot.encoding 'full'", "set snapshot.encoding=delta"),
    "task.environment=math:sqrt": ("", "task.max_turns 1", "set task.max_turns=2"),
    "task.environment_timeout_s=3.0": ("", "task.environment", "set task.environment=MODULE:FUNCTION"),
    "task.max_turns=2": ("", "task.name 'sums'", "set task.name=calculator"),
    "task.skip_special_tokens=false": ("", "task.reward", "set task.reward=MODULE:FUNCTION"),
    "task.reward_timeout_s=3.0": ("", "task.reward", "set task.reward=MODULE:FUNCTION"),
    "task.reward_failures=3": ("", "task.reward", "set task.reward=MODULE:FUNCTION"),
    "task.reward_weights.a=1.0": ("", "task.reward", "set task.reward=MODULE:FUNCTION"),
    "samples.prompts=5": ("samples.max_mb=0.0", "samples.max_mb 0.0", "set samples.max_mb=16.0"),
    "model.lora.alpha=8.0": ("", "model.lora.rank 0", "set model.lora.rank=16"),
    'model.lora.targets=["q_proj"]': ("", "model.lora.rank 0", "set model.lora.rank=16"),
    "grpo.rollout_is_threshold=3.0": ("", "grpo.rollout_is 'none'", "set grpo.rollout_is=token"),
    "grpo.kl_loss_type=k2": ("", "grpo.kl_loss_coef 0.0", "set grpo.kl_loss_coef=0.001"),
    "grpo.overlong_buffer.penalty=2.0": ("", "grpo.overlong_buffer.length 0", "set grpo.overlong_buffer.length=8"),
    "grpo.lr_schedule.min_ratio=0.1": ("", "grpo.lr_schedule.kind 'constant'", "set grpo.lr_schedule.kind=linear"),
    "rollout.gpu_memory=0.5": ("", "rollout.engine 'transformers'", "set rollout.engine=vllm"),
    "rollout.kv_cache_gb=2.0": ("", "rollout.engine 'transformers'", "set rollout.engine=vllm"),
}
ALWAYS = """
run.name run.seed run.steps run.checkpoint_every run.loggers model.path model.dtype model.attention
model.lora.rank
task.name task.reward task.instruction task.chat task.stop task.overlong
grpo.train_batch_size grpo.ppo_mini_batch_size grpo.group_size grpo.clip_ratio grpo.clip_ratio_c grpo.lr grpo.betas
grpo.clip_ratio_low grpo.clip_ratio_high grpo.loss_agg_mode grpo.norm_adv_by_std grpo.overlong_filter grpo.zero_variance
grpo.filter_groups.max_num_gen_batches grpo.overlong_buffer.length grpo.importance_sampling_level grpo.lr_schedule.kind grpo.lr_schedule.warmup_ticks grpo.kl_in_reward
grpo.weight_decay grpo.grad_clip grpo.max_prompt_length grpo.max_response_length grpo.old_logprobs grpo.rollout_is
grpo.kl_loss_coef grpo.entropy_coeff
rollout.engine rollout.replicas rollout.temperature rollout.batch_size rollout.val_temperature rollout.timeout_s
rollout.device rollout.resource rollout.placement rollout.mismatch_every rollout.max_mismatch_kl rollout.max_staleness
snapshot.dtype snapshot.encoding
swarm.dp swarm.pp swarm.boundaries swarm.device swarm.placement swarm.resource swarm.micro_batch_size swarm.share_prompts
swarm.activation_checkpointing swarm.threads swarm.check_every swarm.on_nan swarm.timeout_s swarm.start_timeout_s
faults.budget faults.a_tick faults.spares faults.spare_s faults.grace_s
codec.max_kl anchor.enabled anchor.resource merger.kind merger.placebo val.every val.size val.samples val.by val.sets samples.max_mb diagnostics.every
links.swarm_mbit links.swarm_latency_ms links.anchor_mbit links.anchor_latency_ms links.jitter links.worker_tokens_s
links.anchor_tokens_s links.engine_tokens_s links.response_tokens links.prompt_tokens links.blank_ticks
links.engine_nodes links.replica_nodes
faults.budget faults.a_tick faults.slow_factor faults.slow_floor_s faults.hang_factor faults.hang_floor_s
""".split()


def sets(*overrides: str) -> list[str]:
    return [x for override in overrides for x in ("--set", override)]


def keys_of(section: type, path: str = "") -> set[str]:
    """Every key of the config; a section of several kinds (`anchor.lag`) counts as one."""
    found: set[str] = set()
    for key, field in section.model_fields.items():
        nested = hasattr(field.annotation, "model_fields")
        found |= keys_of(field.annotation, f"{path}{key}.") if nested else {path + key}
    return found


def test_of_every_key_it_is_said_whether_it_is_always_read_or_by_which_kinds():
    assert set(ALWAYS) & set(READERS) == set()
    assert set(ALWAYS) | set(READERS) - {"task.params.train"} == keys_of(RunConfig)  # params have no keys of their own


def test_what_reads_a_key_is_a_key_and_a_value_that_the_config_allows():
    for when in (when for ways in READERS.values() for way in ways for when in way):
        if when.key == "anchor.lag.kind":
            assert load("k5", [f"anchor.lag.kind={when.values[0]}"]).anchor.lag.kind == when.values[0]
            continue
        section: Any = RunConfig
        *tables, key = when.key.split(".")
        for table in tables:
            section = section.model_fields[table].annotation
        kinds = {kind for kind in get_args(section.model_fields[key].annotation) if isinstance(kind, str)}
        assert not kinds or set(when.values) <= kinds


@pytest.mark.parametrize("given", UNREAD)
def test_a_setting_that_does_nothing_is_refused_with_the_kind_that_reads_it(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    beside, *says = UNREAD[given]
    result = CliRunner().invoke(app, ["run", "k5", *sets(given, *beside.split()), "--out", "run"])
    assert result.exit_code == 2, result.output
    key, _, value = given.partition("=")
    assert f"{key} = " in result.stderr and value in result.stderr and "is not read by" in result.stderr
    assert all(part in result.stderr for part in says), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_key_that_is_not_always_read_is_refused_somewhere_above():
    refused = {given.partition("=")[0].removesuffix(".kind") for given in UNREAD} | {
        "codec.kind",
        "codec.gradient.kind",
    }
    # below; of a table a key of its own
    tables = {"task.params", "task.params.train", "task.reward_weights", "task.template_options"}
    assert set(READERS) - tables <= refused


@pytest.mark.parametrize("command", [["plan"], ["simulate"], ["probe"], ["doctor"]], ids=" ".join)
def test_every_command_that_takes_a_config_refuses_it(command: list[str]):
    result = CliRunner().invoke(app, [*command, "k5", *sets("codec.kind=transform", "codec.rank=100000")])
    assert result.exit_code == 2
    assert (
        "codec.rank = 100000 is not read by codec.kind 'transform': codec.kind 'powersgd' or 'random_k' reads it"
        in result.stderr
    )


def test_a_file_of_ones_own_is_held_to_what_it_says_and_not_to_what_it_extends(tmp_path: Path):
    lower, upper = tmp_path / "lower.toml", tmp_path / "upper.toml"
    lower.write_text('extends = "k5"\n[merger]\ndose = 0.5\n[anchor]\ndelay_k = 7\n')
    upper.write_text(f'extends = "{lower}"\n[anchor]\nenabled = false\n[merger]\nkind = "none"\n')
    found = load(str(upper))
    assert (found.merger.dose, found.anchor.delay_k) == (1.0, 5)
    upper.write_text(upper.read_text() + "alpha = 0.5\n")
    result = CliRunner().invoke(app, ["plan", str(upper)])
    assert result.exit_code == 2 and "merger.alpha = 0.5 is not read by merger.kind 'none'" in result.stderr


def test_what_a_preset_brings_is_dropped_with_the_kind_that_read_it():
    assert load("k5", ["codec.kind=transform"]).codec == load("k5", ["codec.kind=none"]).codec.model_copy(
        update={"kind": "transform"}
    )
    north = load("north-star-outage", NO_ANCHOR.split())
    assert north.anchor == load("k5", NO_ANCHOR.split()).anchor
    assert load("k20", NO_ANCHOR.split()).q_cadence == 20  # which Q follows though no anchor does


@pytest.mark.parametrize("overrides", [[], NO_ANCHOR.split(), ["codec.kind=transform"], PLACEBO.split()])
def test_the_config_of_a_run_folder_runs_as_it_is(overrides: list[str], tmp_path: Path):
    config, stored = (
        load("north-star", ["anchor.clock=lockstep", "anchor.lag.kind=fixed", *overrides]),
        tmp_path / "c.toml",
    )
    stored.write_text(to_toml(config))
    assert load(str(stored)) == config
    check_resumes(stored, config)


def test_a_run_begun_with_settings_that_did_nothing_can_go_on(tmp_path: Path):
    config, stored = load("dense"), tmp_path / "config.toml"
    stored.write_text(to_toml(config).replace('kind = "none"', 'kind = "none"\nrank = 4', 1))
    assert "rank = 4" in stored.read_text()
    check_resumes(stored, config)


def test_a_key_set_to_its_default_changes_nothing_and_is_let_through():
    assert load("k5", ["merger.kind=none", "merger.dose=1.0"]) == load("k5", ["merger.kind=none"])


def test_a_task_that_plan_does_not_look_at_may_have_parameters(tmp_path: Path):
    task = sets("task.name=reasoning_gym:chain_sum", "task.params.min_terms=2")
    result = CliRunner().invoke(app, ["plan", "k5", *task])
    assert result.exit_code == 0, result.output


def test_parameters_of_a_task_are_refused_where_nobody_reads_them(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    for task, says in (
        (["task.params.min_terms=2"], "sums takes none, got min_terms"),
        (["task.template_options.a=1"], "task.template_options.a = 1 is not read by task.chat false"),
        ([f"task.name=jsonl:{rows}", "task.params.train=a"], "task.params.train = 'a' is not read by task.name"),
    ):
        result = CliRunner().invoke(app, ["run", "k5", *sets(*task), "--out", str(tmp_path / "run")])
        assert result.exit_code == 2 and says in result.stderr
    file = tmp_path / "gym.toml"
    file.write_text('extends = "k5"\n[task]\nname = "reasoning_gym:chain_sum"\nparams = {min_terms = 2}\n')
    (tmp_path / "sums.toml").write_text(f'extends = "{file}"\n[task]\nname = "sums"\n')
    assert load(str(tmp_path / "sums.toml")).task.params == {}  # inherited from another task


SWEEP = 'name = "s"\nbase = "k5"\nseeds = [0]\n[cells]\nK5 = {}\nfloor = {anchor.enabled = false, merger.kind = "none"'


def test_a_cell_is_held_to_its_own_keys(tmp_path: Path):
    file = tmp_path / "s.toml"
    file.write_text(SWEEP + ", anchor.delay_k = 20}\n")
    with pytest.raises(
        SweepError, match=r"cell floor, seed 0: k5: anchor.delay_k = 20 is not read by anchor.enabled false"
    ):
        planned_runs(read_sweep(file), tmp_path, [])


def test_a_grid_and_a_set_are_dropped_where_a_cell_does_not_read_them_and_refused_where_none_does(tmp_path: Path):
    file = tmp_path / "s.toml"
    file.write_text(SWEEP + "}\n[grid]\nmerger.dose = [0.5, 1.0]\n")
    found = {run.job.name: run.config for run in planned_runs(read_sweep(file), tmp_path, ["anchor.beta_anc=0.9"])}
    assert found["K5-dose_0.5"].merger.dose == 0.5 and found["K5-dose_0.5"].anchor.beta_anc == 0.9
    assert found["floor-dose_0.5"].merger.dose == 1.0 and found["floor-dose_0.5"].anchor.beta_anc == 0.5
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(tmp_path / "out"), *sets("codec.coder=fixed")])
    assert result.exit_code == 2 and "codec.coder is read by no cell of s" in result.stderr
    file.write_text(SWEEP + "}\n[grid]\nmerger.lambda_cap = [0.5, 1.0]\n")
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "merger.lambda_cap is read by no cell of s" in result.stderr
    assert not (tmp_path / "out").exists()
