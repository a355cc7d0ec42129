"""`make bench-trl`: that both sides are asked for the same work, in turn, and what is made of their seconds. Without TRL."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed_picture import RESULTS, bars_of
from benchmarks.trl_step import CASES, CODED, PLAIN, TRL, Steps, configs, in_rounds, ratios_to, table_of, trl_settings

ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", CASES)
def test_both_rows_and_trl_are_asked_for_the_same_work(name: str):
    case = CASES[name]
    if case.file:  # of a model on the hub nothing is read
        plain, coded = ((preset, [*sets, f"model.path={ON_THE_HUB}"]) for preset, sets in (case.plain, case.coded))
        case = case._replace(plain=plain, coded=coded)
    rows = configs(case, threads=2)
    asked = [(c.model, c.task, c.grpo, c.rollout, c.swarm, c.run.steps) for c in rows.values()]
    assert asked[0] == asked[1] and rows[PLAIN].codec.kind == "none" and rows[CODED].codec.kind == "transform"
    config, settings = rows[PLAIN], trl_settings(rows[PLAIN])
    assert (config.swarm.dp, config.swarm.pp, config.swarm.threads, config.anchor.enabled) == (1, 1, 2, False)
    samples = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert samples == case.prompts * settings["num_generations"] == case.prompts * config.grpo.group_size
    assert config.grpo.ppo_mini_batch_size == config.grpo.train_batch_size == config.rollout.batch_size == case.prompts


def test_replicas_share_the_prompts_of_a_step():
    for config in configs(CASES["tiny"], threads=1, replicas=2).values():
        assert config.swarm.dp == config.rollout.replicas == 2 and config.shares_prompts
        assert 2 * config.rollout.batch_size == config.grpo.train_batch_size == CASES["tiny"].prompts


def test_microbatches_that_do_not_divide_a_step_are_refused():
    config = configs(CASES["tiny"], threads=1)[PLAIN]
    config = config.model_copy(update={"swarm": config.swarm.model_copy(update={"micro_batch_size": 48})})
    with pytest.raises(ValueError, match="micro_batch_size 48 does not divide the 128 samples"):
        trl_settings(config)


def test_each_round_begins_with_another_job(tmp_path: Path):
    order: list[str] = []

    def job(name: str):
        return lambda folder: order.append(name) or Steps([1.0], [1.0], 2.0)

    found = in_rounds({name: job(name) for name in "abc"}, 2, tmp_path, lambda line: None)
    assert order == [*"abc", *"bca"] and {name: len(steps) for name, steps in found.items()} == dict.fromkeys("abc", 2)


def test_a_ratio_is_of_the_medians_of_one_round():
    slow = [Steps([3.0, 1.0, 2.0], [1.0], 10.0), Steps([9.0, 8.0, 7.0], [3.0], 12.0)]  # then four times as busy
    fast = [Steps([1.0, 1.0, 9.0], [1.0], 10.0), Steps([4.0, 4.0, 4.0], [1.0], 12.0)]
    assert ratios_to(slow, fast, lambda steps: steps.seconds) == [2.0, 2.0]
    trl, here = table_of({TRL: slow, PLAIN: fast})
    assert "11.0 tokens an answer, 5.00 s a step, 2.00 CPU s a step" in trl and " x," not in trl
    assert "4.00 s a step (TRL's is 2.00 x, 2.00 to 2.00)" in here and "(TRL's is 2.00 x, 1.00 to 3.00)" in here


def test_the_picture_of_the_page_is_of_its_numbers():
    """Those that a panel's title and a bar's name stand for, and in the page's own words."""
    panels = bars_of((RESULTS / "data" / "speed.csv").read_text())
    assert [len(bars) for bars in panels.values()] == [4, 6, 4, 2]
    picture, page = (RESULTS / "speed.svg").read_text(), (RESULTS / "speed.md").read_text()
    for title, bars in panels.items():
        assert title.partition("'")[0] in picture
        for bar in bars:
            assert bar.name in picture and f"{bar.value:.3g}" in picture
            assert bar.low is None or bar.low <= bar.value <= (bar.high or 0)
            assert f"{bar.value:.2f}" in page or f"{bar.value:.3f}" in page
