"""A bad config is refused in no time with one message that says what to change; a good one survives its own TOML."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest

from codec.boundary import CODECS
from codec.config import KINDS
from deploy.config import ConfigError, load, preset_names, to_toml
from rl.config import RolloutConfig
from rl.rollout import ENGINES
from swarm.run_config import RunConfig

SHAPE = {"model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 17}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metadata of a small model (hidden 128, 4 layers), and models and files that are no use."""
    root = tmp_path_factory.mktemp("configs")
    for name, text in {
        "model/config.json": json.dumps(SHAPE),
        "empty/readme": "",
        "gpt2/config.json": json.dumps(SHAPE | {"model_type": "gpt2"}),
        "torn/config.json": '{"model_type": "qwen2", ',
        "bare/config.json": '{"model_type": "qwen2"}',
        "junk.gguf": "this is no GGUF file",
        "a.toml": f'extends = "{root}/b.toml"\n',
        "b.toml": f'extends = "{root}/a.toml"\n',
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "base.toml").write_text(f'[model]\npath = "{root}/model"\n')
    return root


def write(folder: Path, text: str, name: str = "run.toml") -> str:
    """A TOML file on top of the model above."""
    file = folder / name
    file.write_text(f'extends = "{folder}/base.toml"\n{text}')
    return str(file)


# --- what is refused ---------------------------------------------------------------------------


@dataclass
class Bad:
    """A config that must be refused with one message that holds all of `says`. `ROOT` is the folder above."""

    says: list[str]
    sets: list[str] = field(default_factory=list)
    text: str = ""
    source: str = ""


POWERSGD = ["codec.kind=powersgd", "codec.rank=16", "swarm.boundaries=[2]"]
BAD = {
    # keys
    "a typo in a key": Bad(["'grpo.lrr'", "did you mean 'lr'", "group_size"], ["grpo.lrr=1e-5"]),
    "a typo in a section": Bad(["'mergr'", "did you mean 'merger'", "anchor"], ["mergr.kind=none"]),
    "a typo in a subsection": Bad(["'codec.gradient.rnk'", "did you mean 'rank'"], [*POWERSGD, "codec.gradient.rnk=2"]),
    "a key at top level": Bad(["'steps'", "allowed: anchor, codec", "run"], ["steps.x=3"]),
    # codec
    "a rank beyond the hidden size": Bad(["codec.rank", "129", "at most 128"], ["codec.kind=powersgd", "codec.rank=129"]),
    "a rank ratio above 1": Bad(["codec.rank_ratio", "1.5", "less than or equal to 1"], ["codec.rank_ratio=1.5"]),
    "a rank ratio of 0": Bad(["codec.rank_ratio", "0", "greater than 0"], ["codec.rank_ratio=0"]),
    "rank and rank ratio": Bad(["codec", "rank 16", "rank_ratio 0.05", "remove one"], [*POWERSGD, "codec.rank_ratio=0.05"]),
    "random_k without a rank": Bad(["codec", "random_k needs a rank", "set rank or rank_ratio"], ["codec.kind=random_k"]),
    "dither of unequal steps": Bad(["codec", 'dither true needs coder "entropy"'], ["codec.kind=transform", "codec.coder=fixed", "codec.dither=true"]),
    "powersgd without a rank": Bad(["codec", "set rank or rank_ratio"], ["codec.kind=powersgd"]),
    "an unknown codec": Bad(["codec.kind", "'powersg'", "'none', 'powersgd', 'random_k', 'transform'", "did you mean 'powersgd'"], ["codec.kind=powersg"]),
    "a Q cadence of 0": Bad(["codec.q_cadence", "0", "greater than or equal to 1"], ["codec.q_cadence=0"]),
    # anchor and merger
    "a cadence of 0": Bad(["anchor.cadence", "0", "greater than or equal to 1"], ["anchor.cadence=0"]),
    "a delay of 0": Bad(["anchor.delay_k", "0", "greater than or equal to 1"], ["anchor.delay_k=0"]),
    "a beta of 1": Bad(["anchor.beta_anc", "1.0", "less than 1"], ["anchor.beta_anc=1.0"]),
    "an unknown merger": Bad(["merger.kind", "'singed_ema'", "'delta'", "did you mean 'signed_ema'"], ["merger.kind=singed_ema"]),
    "a merger without an anchor": Bad(
        ["merger.kind", "'signed_ema'", "anchor.enabled=true or merger.kind=none"], ["anchor.enabled=false"]
    ),
    "an alpha above 1": Bad(["merger.alpha", "1.25", "less than or equal to 1"], ["merger.alpha=1.25"]),
    "a dose below 0": Bad(["merger.dose", "-0.5", "greater than or equal to 0"], ["merger.dose=-0.5"]),
    "an age decay of 0": Bad(["merger.age_decay", "greater than 0"], ["merger.age_decay=0.0"]),
    # swarm
    "a boundary outside the model": Bad(["swarm.boundaries", "4", "1 to 3"], ["swarm.boundaries=[2, 4]"]),
    "a boundary in front of the first layer": Bad(["boundaries", "[0]", "from 1 on"], ["swarm.boundaries=[0]"]),
    "boundaries unsorted": Bad(["boundaries", "[3, 1]", "increasing"], ["swarm.boundaries=[3, 1]"]),
    "a boundary twice": Bad(["boundaries", "[2, 2]", "increasing"], ["swarm.boundaries=[2, 2]"]),
    "pp that does not fit the boundaries": Bad(["swarm", "pp", "2 stages", "give 1 boundaries"], ["swarm.pp=2"]),
    "dp that does not divide the samples": Bad(
        ["swarm.dp", "7", "64 samples", "grpo.ppo_mini_batch_size x grpo.group_size"], ["swarm.dp=7"]
    ),
    "dp of 0": Bad(["swarm.dp", "0", "greater than or equal to 1"], ["swarm.dp=0"]),
    "an unknown device": Bad(["swarm.device", "'gpu'", "'cpu' or 'cuda'"], ["swarm.device=gpu"]),
    # model
    "a missing model folder": Bad(["model.path", "ROOT/nowhere", "hub id"], ["model.path=ROOT/nowhere"]),
    "a model folder without metadata": Bad(["model.path", "ROOT/empty", "no config.json"], ["model.path=ROOT/empty"]),
    "an unsupported model": Bad(["model.path", "'gpt2'", "Qwen2.5 (qwen2)"], ["model.path=ROOT/gpt2"]),
    "torn metadata": Bad(["model.path", "ROOT/torn", "not valid JSON"], ["model.path=ROOT/torn"]),
    "metadata without a shape": Bad(["model.path", "ROOT/bare", "hidden_size"], ["model.path=ROOT/bare"]),
    "a damaged GGUF file": Bad(["model.path", "ROOT/junk.gguf", "GGUF"], ["model.path=ROOT/junk.gguf"]),
    "an unknown built-in model": Bad(["model.path", "'builtin:huge'", "there are: tiny"], ["model.path=builtin:huge"]),
    "an empty model path": Bad(["model.path", "''"], ["model.path="]),
    "an unknown attention": Bad(["model.attention", "'spda'", "did you mean 'sdpa'"], ["model.attention=spda"]),
    "flash attention in fp32": Bad(["model.attention", "model.dtype=bfloat16"], ["model.attention=flash_attention_2"]),
    "flash attention on a CPU": Bad(
        ["model.attention 'flash_attention_2'", "rollout.device=cuda", "'cpu'"],
        ["model.attention=flash_attention_2", "model.dtype=bfloat16", "swarm.device=cuda"],
    ),
    "shared prompts without sdpa": Bad(
        ["swarm.share_prompts", "'eager'", "model.attention=sdpa or swarm.share_prompts=false"],
        ["swarm.share_prompts=true", "model.attention=eager"],
    ),
    "a chat without a template": Bad(["task.chat", "ROOT/model", "chat_template.jinja", "task.chat=false"], ["task.chat=true"]),
    "an unknown dtype": Bad(["model.dtype", "'float16'", "'float32' or 'bfloat16'"], ["model.dtype=float16"]),
    # grpo, rollout, task, run
    "a batch that is no whole number of ticks": Bad(["train_batch_size 20", "ppo_mini_batch_size 8"], ["grpo.train_batch_size=20"]),
    "a group of one": Bad(["grpo.group_size", "1", "greater than or equal to 2"], ["grpo.group_size=1"]),
    "a negative learning rate": Bad(["grpo.lr", "-1e-05", "greater than 0"], ["grpo.lr=-1e-5"]),
    "a learning rate that is no number": Bad(["grpo.lr", "nan", "finite"], ["grpo.lr=nan"]),
    "a beta of Adam of 1": Bad(["betas", "1.0", "[0, 1)"], ["grpo.betas=[0.9, 1.0]"]),
    "a clip ratio of 0": Bad(["grpo.clip_ratio", "greater than 0"], ["grpo.clip_ratio=0.0"]),
    "a warm-up longer than the run": Bad(
        ["grpo.lr_schedule.warmup_ticks 151", "150 ticks of 75 steps", "raise run.steps"], ["grpo.lr_schedule.warmup_ticks=151"]
    ),
    "a buffer longer than an answer": Bad(
        ["overlong_buffer.length 41", "max_response_length 40", "at most that"], ["grpo.overlong_buffer.length=41"]
    ),
    "groups of one reward where none has one": Bad(
        ["zero_variance 'drop'", "kl_in_reward 0.1", "kl_loss_coef keeps the KL"], ["grpo.zero_variance=drop", "grpo.kl_in_reward=0.1"]
    ),
    "groups sampled again ahead of their step": Bad(
        ["grpo.filter_groups.max_num_gen_batches 3", "rollout.max_staleness 1", "to its default"],
        ["grpo.filter_groups.max_num_gen_batches=3", "rollout.max_staleness=1", "grpo.rollout_is=token"],
    ),
    "an unknown way to aggregate": Bad(
        ["grpo.loss_agg_mode", "'seq-mean'", "'seq-mean-token-sum-norm'"], ["grpo.loss_agg_mode=seq-mean"]
    ),
    "a lag whose kind is not said": Bad(["anchor.lag.kind is missing"], ["anchor.lag.mean=8"]),
    "a trace that is none": Bad(["ROOT/junk.gguf", "entry 1"], ["anchor.lag.kind=trace", "anchor.lag.path=ROOT/junk.gguf"]),
    "an unknown engine": Bad(["rollout.engine", "'vlm'", "'transformers'", "'vllm'"], ["rollout.engine=vlm"]),
    "colocated engines on a CPU": Bad(
        ["placement 'colocated'", "device is 'cpu'", "device=cuda"], ["rollout.engine=vllm", "rollout.placement=colocated"]
    ),
    "colocated engines of transformers beside workers on CPUs": Bad(
        ["rollout.placement 'colocated'", "swarm.device 'cpu'"], ["rollout.device=cuda", "rollout.placement=colocated"]
    ),
    "colocated engines that measure what is free": Bad(
        ["placement 'colocated'", "kv_cache_gb"],
        ["rollout.engine=vllm", "rollout.device=cuda", "rollout.placement=colocated", "swarm.device=cuda"],
    ),
    "colocated engines that sample ahead": Bad(
        ["rollout", "max_staleness 1", "placement 'colocated'", "placement=separate"],
        ["rollout.engine=vllm", "rollout.device=cuda", "rollout.placement=colocated", "rollout.kv_cache_gb=1", "swarm.device=cuda", "rollout.max_staleness=1", "grpo.rollout_is=token"],
    ),
    "samples of older weights that nothing corrects for": Bad(
        ["rollout.max_staleness 2", "grpo.rollout_is=token", "grpo.old_logprobs=rollout"], ["rollout.max_staleness=2"]
    ),
    "samples of weights to come": Bad(["rollout.max_staleness", "-1", "greater than or equal to 0"], ["rollout.max_staleness=-1"]),
    "a colocated anchor on a CPU": Bad(["placement 'colocated'", "'cpu'", "device=cuda"], ["anchor.placement=colocated"]),
    "a colocated anchor beside workers on CPUs": Bad(
        ["anchor.placement 'colocated'", "swarm.device 'cpu'"], ["anchor.device=cuda", "anchor.placement=colocated"]
    ),
    "a colocated anchor with nodes of its own": Bad(
        ["resource 'far'", "placement=separate"],
        ["anchor.device=cuda", "anchor.placement=colocated", "swarm.device=cuda", "anchor.resource=far"],
    ),
    "more colocated anchor workers than workers": Bad(
        ["anchor.placement 'colocated'", "3 anchor workers", "anchor.workers to at most 1"],
        ["anchor.device=cuda", "anchor.placement=colocated", "swarm.device=cuda", "anchor.workers=3"],
    ),
    "more colocated engines than workers": Bad(
        ["2 engines", "1 workers", "'cuda'"],
        ["rollout.engine=vllm", "rollout.device=cuda", "rollout.placement=colocated", "rollout.kv_cache_gb=1", "rollout.replicas=2", "swarm.device=cuda"],
    ),
    "a limit on what is not measured": Bad(
        ["max_mismatch_kl", "mismatch_every=1"], ["rollout.max_mismatch_kl=0.1", "rollout.mismatch_every=0"]
    ),
    "a temperature that overflows": Bad(["rollout.temperature", "1e-40", "0.01"], ["rollout.temperature=1e-40"]),
    "greedy training": Bad(["rollout.temperature", "0.0", "0.01"], ["rollout.temperature=0.0"]),
    "a validation temperature that overflows": Bad(
        ["val_temperature 1e-40", "0 (greedy)", "0.01"], ["rollout.val_temperature=1e-40"]
    ),
    "no validation prompts": Bad(["val.size", "0 must be a whole number from 1 on, or 'all'"], ["val.size=0"]),
    "half a set": Bad(["val.sets.a.size", "2.5 must be a whole number from 1 on, or 'all'"], ["val.sets.a.size=2.5"]),
    "a typo in a set": Bad(["'val.sets.a.tsk'", "did you mean 'task'", "temperature"], ["val.sets.a.tsk=sums"]),
    "a set of an unknown task": Bad(["val.sets.a.task", "'sumz'", "did you mean 'sums'"], ["val.sets.a.task=sumz"]),
    "a set of a file that is not there": Bad(["val.sets.a.task", "no such file", "none.jsonl"], ["val.sets.a.task=jsonl:none.jsonl"]),
    "a set that is a part of a file": Bad(["val.sets.a.params", "all rows of the file"], ["val.sets.a.task=jsonl:ROOT/torn/config.json", "val.sets.a.params.val=x"]),
    "a set of a data set without a split": Bad(["val.sets.a.params", "val is missing"], ["val.sets.a.task=hf:a/b"]),
    "columns of no set's own": Bad(["val.sets.a.params", "val.sets.a.task"], ["val.sets.a.params.prompt=x"]),
    "a set that is called like the task": Bad(["val.sets.sums", "'sums'", "choose another"], ["val.sets.sums.size=3"]),
    "a set whose name is no part of a metric's": Bad(["val.sets", "'a/b'", "letters, digits"], ["val.sets.a/b.size=3"]),
    "several greedy answers in a set": Bad(
        ["val.sets.a.samples 4 greedy", "val.sets.a.temperature above 0"], ["val.sets.a.temperature=0.0", "val.samples=4"]
    ),
    "rows left out of a task that makes its problems": Bad(
        ["task.overlong", "'drop'", "sums", "grpo.max_prompt_length"], ["task.overlong=drop"]
    ),
    "importance weights that are all one": Bad(
        ["rollout_is", "old_logprobs=trainer"], ["grpo.rollout_is=token", "grpo.old_logprobs=rollout"]
    ),
    "an unknown task": Bad(["task.name", "'sumz'", "did you mean 'sums'", "jsonl:PATH"], ["task.name=sumz"]),
    "an unknown reasoning_gym task": Bad(
        ["task.name", "'chain_sums'", "did you mean 'chain_sum'"], ["task.name=reasoning_gym:chain_sums"]
    ),
    "a parameter that a reasoning_gym task has not": Bad(
        ["task.params", "mx_terms", "max_terms"],
        ["task.name=reasoning_gym:chain_sum", "task.params.mx_terms=3"],
    ),
    "parameters that a reasoning_gym task refuses": Bad(
        ["task.params", "max_terms must be >= min_terms"],
        ["task.name=reasoning_gym:chain_sum", "task.params.min_terms=9", "task.params.max_terms=4"],
    ),
    "a missing jsonl file": Bad(["task.name", "'ROOT/no.jsonl'", "no such file"], ["task.name=jsonl:ROOT/no.jsonl"]),
    "no steps": Bad(["run.steps", "0", "greater than or equal to 1"], ["run.steps=0"]),
    "a name that is no file name": Bad(["run.name", "'a/b'", "pattern"], ["run.name=a/b"]),
    # kinds of values: nothing is read as something else
    "a number in quotes": Bad(["run.steps", "'7'", "integer"], ["run.steps='7'"]),
    "true for a number": Bad(["run.steps", "True", "integer"], ["run.steps=true"]),
    "a number for true": Bad(["anchor.enabled", "1", "boolean"], ["anchor.enabled=1"]),
    "half a step": Bad(["run.steps", "2.5", "integer"], ["run.steps=2.5"]),
    "words for a number": Bad(["grpo.lr", "'small'", "number"], ["grpo.lr=small"]),
    "a number for a list": Bad(["swarm.boundaries", "2", "list"], ["swarm.boundaries=2"]),
    # --set, presets and files
    "--set without a value": Bad(["--set 'merger.dose'", "section.key=value"], ["merger.dose"]),
    "--set without a section": Bad(["--set 'dose=1'", "section.key=value"], ["dose=1"]),
    "--set with an empty key": Bad(["--set 'merger.=1'", "section.key=value"], ["merger.=1"]),
    "--set into a value": Bad(["--set 'model.path.x=1'", "'path' is not a section"], ["model.path.x=1"], text="[model]\npath='x'"),
    "an unknown preset": Bad(["'k5x'", "did you mean 'k5'", "k20"], source="k5x"),
    "a missing file": Bad(["'ROOT/none.toml'", "presets are"], source="ROOT/none.toml"),
    "invalid TOML": Bad(["not valid TOML", "run.toml"], text="[run\nname = 3"),
    "a file that is no text": Bad(["not valid TOML", "binary.toml"], source="ROOT/binary.toml"),
    "files that extend each other": Bad(["ROOT/a.toml", "ROOT/b.toml", "extends itself"], source="ROOT/a.toml"),
    "an extends that is no name": Bad(["extends", "3", "name of a preset"], source="ROOT/extends.toml"),
    "a section that is a value": Bad(["swarm", "4"], source="ROOT/section.toml"),
}  # fmt: skip

CHILD = """
import json, sys
from deploy.config import PRESETS, ConfigError, load
found = {}
for name, (source, sets) in json.load(sys.stdin).items():
    try:
        load(source, sets)
        found[name] = ["accepted", ""]
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
heavy = [m for m in ("torch", "ray", "transformers") if m in sys.modules]
print(json.dumps([found, heavy]))
"""


@pytest.fixture(scope="session")
def verdicts(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """What `load` says of every bad config, in one fresh process, and what heavy modules that imported."""
    (folder / "binary.toml").write_bytes(b"\xff\xfe[run]")
    (folder / "extends.toml").write_text("extends = 3\n")
    (folder / "section.toml").write_text("swarm = 4\n")
    asked = {}
    for i, (name, bad) in enumerate(BAD.items()):
        source = bad.source.replace("ROOT", str(folder))
        if not source:
            (folder / f"{i}").mkdir()
            body = bad.text or f'extends = "{folder}/base.toml"\n'
            (folder / f"{i}" / "run.toml").write_text(body)
            source = str(folder / f"{i}" / "run.toml")
        asked[name] = (source, [s.replace("ROOT", str(folder)) for s in bad.sets])
    child = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_by_naming_the_field_the_value_and_what_is_allowed(verdicts, folder: Path, name: str):
    kind, message = verdicts[0][name]
    assert kind == "ConfigError", f"{kind}: {message}"
    missing = [part for part in BAD[name].says if part.replace("ROOT", str(folder)) not in message]
    assert not missing, message
    assert "pydantic" not in message and "Traceback" not in message


def test_refusing_a_config_imports_neither_torch_nor_ray_nor_transformers(verdicts):
    assert verdicts[1] == []


def test_all_that_is_wrong_is_said_at_once(folder: Path):
    with pytest.raises(ConfigError) as caught:
        load(write(folder, ""), ["run.steps=0", "grpo.lr=-1", "merger.kind=x", "codec.nope=1"])
    assert all(key in str(caught.value) for key in ("run.steps", "grpo.lr", "merger.kind", "codec.nope"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["k5", "--set", "codec.rank=999"], ["codec.rank", "999", "128"]),
        (["k5x"], ["'k5x'", "did you mean 'k5'"]),
        (["k5", "--set", "task.name=reasoning_gym:chain_sums"], ["did you mean 'chain_sum'"]),
    ],
)
def test_the_command_refuses_with_exit_code_2_and_under_2_seconds_of_work(
    tmp_path: Path, arguments: list[str], says: list[str]
):
    command = Path(sysconfig.get_path("scripts")) / "northstar"
    with (tmp_path / "err").open("w") as err:
        child = subprocess.Popen(
            [command, "run", *arguments], stdout=subprocess.DEVNULL, stderr=err, cwd=tmp_path, text=True
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    message = (tmp_path / "err").read_text()
    assert child.returncode == 2, message
    assert all(part in message for part in says) and "Traceback" not in message
    assert usage.ru_utime + usage.ru_stime < 2
    assert [p.name for p in tmp_path.iterdir()] == ["err"]  # no run folder was made


# --- what is accepted --------------------------------------------------------------------------


def test_the_smallest_config_is_a_model_and_nothing_else(folder: Path):
    assert load(write(folder, "")).model.path == f"{folder}/model"


@pytest.mark.parametrize(
    "sets",
    [
        ["swarm.boundaries=[1, 2, 3]", "swarm.pp=4"],
        ["swarm.boundaries=[1, 2, 3]", "swarm.pp=2"],
        ["swarm.boundaries=[3]"],
        ["swarm.dp=64"],
        ["codec.kind=powersgd", "codec.rank=128", "swarm.boundaries=[2]"],
        ["codec.kind=powersgd", "codec.rank_ratio=1", "swarm.boundaries=[2]"],
        ["anchor.enabled=false", "merger.kind=none"],
        ["anchor.delay_k=1", "anchor.cadence=1"],
        ["anchor.delay_k=7", "anchor.cadence=3", *POWERSGD, "codec.q_cadence=2"],
        ["grpo.lr=1", "merger.dose=0"],
        ["model.path=someone/not-on-this-machine", "swarm.boundaries=[200]"],
    ],
    ids=" ".join,
)
def test_what_lies_just_inside_the_bounds_is_accepted(folder: Path, sets: list[str]):
    load(write(folder, ""), sets)


def test_q_is_refreshed_with_m_unless_told_otherwise(folder: Path):
    assert load(write(folder, ""), ["anchor.cadence=7"]).q_cadence == 7
    assert load(write(folder, ""), ["anchor.cadence=7", *POWERSGD, "codec.q_cadence=3"]).q_cadence == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.steps=12", "steps", 12),
        ("run.name=trial_2.b", "name", "trial_2.b"),
        ('run.name="quoted"', "name", "quoted"),
        (" run.steps = 12 ", "steps", 12),
        ("grpo.lr=2e-5", "lr", 2e-5),
        ("grpo.lr=1", "lr", 1.0),
        ("grpo.betas=[0.5, 0.9]", "betas", (0.5, 0.9)),
        ("swarm.boundaries=[1, 3]", "boundaries", [1, 3]),
        ("swarm.boundaries=[]", "boundaries", []),
        ("task.chat=false", "chat", False),
        ("task.name=reasoning_gym:chain_sum", "name", "reasoning_gym:chain_sum"),
        ("task.instruction=a=b, c", "instruction", "a=b, c"),
        ("merger.kind=delta", "kind", "delta"),
        ("rollout.val_temperature=0.5", "val_temperature", 0.5),
    ],
)
def test_a_value_that_is_set_has_the_type_it_is_written_in(folder: Path, override: str, key: str, value: Any):
    section = getattr(load(write(folder, ""), [override]), override.strip().partition(".")[0])
    assert getattr(section, key) == value and type(getattr(section, key)) is type(value)


def test_params_of_a_task_are_a_table_of_what_is_set(folder: Path):
    sets = ["task.name=reasoning_gym:chain_sum", "task.params.min_terms=2", "task.params.max_digits=1"]
    assert load(write(folder, ""), sets).task.params == {"min_terms": 2, "max_digits": 1}


def test_of_two_values_for_a_key_the_later_counts_and_both_go_over_the_file(folder: Path):
    source = write(folder, "[run]\nsteps = 1\nseed = 5\n")
    found = load(source, ["run.steps=2", "run.steps=3"]).run
    assert (found.steps, found.seed) == (3, 5)


def test_a_file_lies_on_top_of_what_it_extends_key_by_key(folder: Path):
    write(folder, "[run]\nsteps = 9\nseed = 5\n[merger]\ndose = 0.5\n", "lower.toml")
    (folder / "upper.toml").write_text(f'extends = "{folder}/lower.toml"\n[run]\nsteps = 2\n[merger]\nalpha = 0.1\n')
    found = load(str(folder / "upper.toml"))
    assert (found.run.steps, found.run.seed, found.merger.dose, found.merger.alpha) == (2, 5, 0.5, 0.1)


# --- presets and registries --------------------------------------------------------------------


def test_there_is_a_preset_for_each_published_run_and_for_both_controls():
    assert {"k5", "k20", "floor", "dense"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_its_resolved_toml_is_the_same_config(data_at_hand: None, name: str, tmp_path: Path):
    config = load(name)
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load(str(tmp_path / "resolved.toml")) == config
    assert config.run.name == name


def test_the_presets_of_the_published_runs_differ_in_nothing_but_what_they_are_named_for(data_at_hand: None):
    k5 = load("k5").model_dump()

    def differing(name: str) -> set[str]:
        other = load(name).model_dump()
        return {f"{s}.{k}" for s, keys in k5.items() for k in keys if other[s][k] != keys[k]} - {"run.name"}

    assert differing("k20") == {"anchor.delay_k", "anchor.cadence"}
    assert differing("floor") <= {"merger.kind", "anchor.enabled"}
    assert differing("dense") <= {"merger.kind", "anchor.enabled", "codec.kind", "codec.rank"}
    k20, floor, dense = load("k20"), load("floor"), load("dense")
    assert (k20.anchor.delay_k, k20.anchor.cadence) == (20, 20) and k5["anchor"]["delay_k"] == 5
    assert floor.merger.kind == dense.merger.kind == "none" and dense.codec.kind == "none" != floor.codec.kind


def test_the_list_of_presets_names_all_of_them_even_where_a_model_or_its_data_was_not_fetched(tmp_path: Path):
    command = [Path(sysconfig.get_path("scripts")) / "northstar", "presets"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == preset_names()


def values_of(section: type, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


def test_the_config_allows_exactly_the_codecs_and_engines_in_the_registries():
    assert set(KINDS) == set(CODECS)
    assert values_of(RolloutConfig, "engine") == set(ENGINES)


def test_every_key_says_what_it_is():
    def undescribed(section: type, path: str) -> list[str]:
        found = []
        for key, info in section.model_fields.items():
            kinds = [kind for kind in get_args(info.annotation) if hasattr(kind, "model_fields")]
            if hasattr(info.annotation, "model_fields"):
                kinds = [info.annotation]
            if kinds:
                found += [miss for kind in kinds for miss in undescribed(kind, f"{path}{key}.")]
            elif not info.description:
                found.append(path + key)
        return found

    assert undescribed(RunConfig, "") == []


def test_a_config_that_is_set_from_every_key_it_wrote_is_the_same_config(folder: Path):
    """Each key of the resolved TOML, given one by one with --set on top of nothing, rebuilds the config."""
    sets = ["codec.kind=powersgd", "codec.rank=16", "swarm.boundaries=[2]", "task.instruction=say: a = 1", "run.seed=3"]
    config = load(write(folder, ""), sets)

    def leaves(table: dict[str, Any], path: str = "") -> list[str]:
        parts = [
            leaves(v, f"{path}{k}.") if isinstance(v, dict) else [f"{path}{k}={json.dumps(v)}"]
            for k, v in table.items()
        ]
        return list(itertools.chain.from_iterable(parts))

    (folder / "nothing.toml").write_text("")
    assert load(str(folder / "nothing.toml"), leaves(tomllib.loads(to_toml(config)))) == config


def test_another_kind_of_lag_starts_afresh(folder: Path):
    config = load("north-star", ["anchor.lag.kind=uniform", "anchor.lag.high=20"])  # sigma was lognormal's
    assert config.anchor.lag.kind == "uniform" and config.anchor.lag.high == 20
    assert load("north-star-outage").anchor.lag.kind == "outage"


LAG_ERRORS = {
    "a kind that does not exist": (
        ["anchor.lag.kind=lognorml"],
        "anchor.lag.kind = 'lognorml'",
        "did you mean 'lognormal'?",
    ),
    "a key of another kind": (
        ["anchor.lag.kind=uniform", "anchor.lag.sigma=1"],
        "anchor.lag.uniform.sigma",
        "allowed: high",
    ),
    "bounds the wrong way round": (
        ["anchor.lag.kind=uniform", "anchor.lag.low=9", "anchor.lag.high=3"],
        "high 3",
        "low 9",
    ),
    "a trace that is not there": (["anchor.lag.kind=trace", "anchor.lag.path=/nope.csv"], "anchor.lag", "no such file"),
    "an outage without end": (
        ["anchor.lag.kind=outage", "anchor.lag.every=40", "anchor.lag.length=40"],
        "length 40",
        "every 40",
    ),
    "a share above one": (["anchor.replay_fraction=1.5"], "anchor.replay_fraction = 1.5", "less than or equal to 1"),
    "a window beside the source's gradient": (
        ["anchor.replay=window", "merger.kind=delta"],
        "anchor.replay 'window'",
        "set anchor.replay=tick",
    ),
    "a shared stream off the steps": (["anchor.weights=shared"], "anchor.delay_k 5", "multiples of the 2 ticks"),
}


@pytest.mark.parametrize(("overrides", "names", "says"), LAG_ERRORS.values(), ids=LAG_ERRORS)
def test_a_bad_lag_is_refused(overrides: list[str], names: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load("k5", overrides)
    assert names in str(caught.value) and says in str(caught.value)


PLACEBO_ERRORS = {
    "beside an anchor": (["merger.placebo=own"], "set anchor.enabled=false"),
    "for a merger without signs": (
        ["merger.placebo=own", "merger.kind=none", "anchor.enabled=false"],
        "not for 'none'",
    ),
    "with a lag": (["merger.placebo=own", "anchor.enabled=false", "anchor.lag.kind=uniform"], "anchor.lag.kind=fixed"),
    "unknown": (["merger.placebo=ownn"], "must be 'own' or 'random'"),
}


@pytest.mark.parametrize(("overrides", "says"), PLACEBO_ERRORS.values(), ids=PLACEBO_ERRORS)
def test_a_bad_placebo_is_refused(overrides: list[str], says: str):
    with pytest.raises(ConfigError) as caught:
        load("k5", overrides)
    assert says in str(caught.value)


def test_a_placebo_needs_no_anchor():
    assert load("k5", ["merger.placebo=random", "anchor.enabled=false"]).merger.placebo == "random"


def test_validation_is_greedy_at_0_and_as_warm_as_training_where_nothing_is_said():
    assert load("k5", ["rollout.val_temperature=0"]).rollout.validation_temperature == 0.0
    assert load("k5", ["rollout.temperature=0.5"]).rollout.validation_temperature == 0.5


def test_the_order_of_overrides_does_not_matter_where_one_chooses_a_kind():
    keys = ["anchor.lag.mean=8", "anchor.lag.kind=pareto"]
    assert load("k5", keys).anchor.lag == load("k5", keys[::-1]).anchor.lag
    assert load("k5", keys).anchor.lag.mean == 8
