"""A rollout worker on the built-in policy and task: samples, rewards, advantages, reference log-probs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from codec.frames import FrameError, digest, pack
from deploy.config import load
from rl import mismatch
from rl.batch import Batch, Prompts
from rl.config import GrpoConfig, ModelConfig, RolloutConfig, SnapshotConfig, ValConfig
from rl.model_files import BUILTIN
from rl.prompts import PromptTooLong
from rl.reward import RewardError
from rl.rollout import UNDECIDED, RolloutWorker
from rl.task_config import TaskConfig
from swarm.progress import Progress
from swarm.rollouts import Rollouts


def make_worker(model: ModelConfig | None = None, task: TaskConfig | None = None, **grpo) -> RolloutWorker:
    config = GrpoConfig(**({"max_response_length": 40} | grpo))
    return RolloutWorker(
        model or ModelConfig(),
        task or TaskConfig(),
        config,
        RolloutConfig(mismatch_every=2),
        SnapshotConfig(encoding="full"),
        seed=3,
        val=ValConfig(size=32),
        threads=1,
    )


def whole(tick: int, flat: np.ndarray) -> np.ndarray:
    return pack({"tick": tick, "stage": 0, "encoding": "full"}, {"weights": flat})


def ask(worker: RolloutWorker, indices: tuple[int, ...], n: int = 4, split: str = "train") -> Batch:
    frame, peak, _ = worker.generate(Prompts(split, 1, indices, n, 1.0))
    assert peak > 0
    return Batch.from_frame(frame, "engine")[1]


@pytest.fixture(scope="module")
def worker() -> RolloutWorker:
    return make_worker()


def test_chunks_of_prompts_give_the_same_samples_as_all_at_once(worker: RolloutWorker):
    whole = ask(worker, (0, 1, 2, 3))
    for i in range(4):
        alone, part = ask(worker, (i,)), whole.take(4 * i, 4 * i + 4)
        np.testing.assert_array_equal(alone.tokens, part.tokens)
        np.testing.assert_array_equal(alone.rewards, part.rewards)


def test_steps_and_samples_differ_but_repeat(worker: RolloutWorker):
    first = ask(worker, (0,), n=16)
    np.testing.assert_array_equal(first.tokens, ask(worker, (0,), n=16).tokens)
    other, *_ = worker.generate(Prompts("train", 2, (0,), 16, 1.0))
    other = Batch.from_frame(other, "engine")[1]
    assert len(other.tokens) != len(first.tokens) or (other.tokens != first.tokens).any()
    assert len({first.take(i, i + 1).tokens.tobytes() for i in range(16)}) > 1


def test_the_first_of_several_validation_answers_is_the_one_that_is_asked_alone(worker: RolloutWorker):
    several, alone = ask(worker, (0, 1, 2), n=4, split="val"), ask(worker, (0, 1, 2), n=1, split="val")
    for i in range(3):
        np.testing.assert_array_equal(several.take(4 * i, 4 * i + 1).tokens, alone.take(i, i + 1).tokens)


def test_rewards_are_the_tasks_scores_and_advantages_are_of_groups(worker: RolloutWorker):
    batch = ask(worker, tuple(range(8)), n=8)
    texts = [
        worker.tokenizer.decode(batch.take(i, i + 1).tokens[batch.prompt[i] :], skip_special_tokens=True)
        for i in range(len(batch))
    ]
    expected = [
        0.0 if batch.truncated[i] else worker.tasks.task.score(worker.tasks.task.example("train", i // 8), texts[i])
        for i in range(len(batch))
    ]
    np.testing.assert_array_equal(batch.rewards, expected)
    assert 0.2 < batch.rewards.mean() < 0.8  # the base policy is neither hopeless nor done
    groups = batch.rewards.reshape(-1, 8)
    centred = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(batch.advantages.reshape(-1, 8), centred, rtol=1e-4, atol=1e-5)


def test_special_tokens_are_in_the_text_of_a_reward_that_asks_for_them(tmp_path: Path):
    file = tmp_path / "closed.py"
    file.write_text("def closed(prompt, response, answer, metadata):\n    return float(response.endswith('$'))\n")
    for skip in (True, False):
        worker = make_worker(task=TaskConfig(reward=f"{file}:closed", skip_special_tokens=skip))
        batch = ask(worker, (0, 1))
        assert batch.rewards.tolist() == [float(not (skip or cut)) for cut in batch.truncated]


def test_turns_with_the_calculator_are_marked_scored_and_repeat_in_any_chunks(worker: RolloutWorker):
    task = TaskConfig(name="calculator", max_turns=3, stop=["?"])
    turns = make_worker(task=task, kl_loss_coef=0.1)
    batch = ask(turns, tuple(range(8)))
    assert (batch.turns <= 3).all() and len(set(batch.turns)) > 1 and len(batch.own) == batch.response_tokens
    at = 0
    for i, one in enumerate(batch.take(i, i + 1) for i in range(len(batch))):
        text, example = turns.tokenizer.decode(one.tokens[one.prompt[0] :]), turns.tasks.task.example("train", i // 4)
        assert [c for c, mine in zip(text, one.own) if not mine] == [
            str(sum(example.metadata["digits"]) % 10) for _ in range(one.turns[0] - 1)
        ]
        assert all(text[k - 1] == "?" for k in np.flatnonzero(~one.own))
        cut = not text.endswith("$") and len(text) == 40
        assert one.truncated[0] == cut and one.rewards[0] == (f"#{example.answer}$" in text)
        prompt, response = one.tokens[: one.prompt[0]].tolist(), one.tokens[one.prompt[0] :]
        (plain,) = turns.engine.plain.score([prompt], [response], 1.0)
        np.testing.assert_allclose(one.rollout_logprobs, plain[one.own], atol=1e-4)
        at += one.own_lengths[0]
    np.testing.assert_allclose(batch.ref_logprobs, batch.rollout_logprobs, atol=1e-4)
    part = ask(turns, (3, 4))
    assert part.tokens.tolist() == batch.take(12, 20).tokens.tolist()
    plain = ask(worker, tuple(range(8)))
    alone = ask(make_worker(task=TaskConfig(name="calculator")), tuple(range(8)))
    assert not alone.own.size and alone.tokens.tolist() == plain.tokens.tolist()
    told = ask(turns, tuple(range(16)), n=1, split="val")
    assert told.turns.max() > 1 and set(told.rewards) == {0, 1}


def test_truncated_answers_score_nothing():
    batch = ask(make_worker(max_response_length=5), tuple(range(4)))
    assert batch.truncated.all() and not batch.rewards.any() and (batch.response_lengths == 5).all()


def test_reference_logprobs_are_those_of_the_base_policy():
    worker = make_worker(kl_loss_coef=0.1)
    before = ask(worker, (0, 1))
    np.testing.assert_allclose(before.ref_logprobs, before.rollout_logprobs, atol=1e-4)
    flat = worker.engine.plain.weights.master.numpy() * np.float32(1.02)
    worker.load_weights(7, whole(7, flat))
    after = ask(worker, (0, 1))
    assert np.abs(after.ref_logprobs - after.rollout_logprobs).max() > 1e-3


def test_what_is_taken_off_rewards_is_in_the_advantages_and_not_in_validation():
    buffer = {"length": 36, "penalty": 2.0}
    worker = make_worker(kl_in_reward=0.5, overlong_buffer=buffer, norm_adv_by_std=False)
    plain = ask(make_worker(), (0, 1))
    worker.load_weights(7, whole(7, worker.engine.plain.weights.master.numpy() * np.float32(1.02)))
    frame, _, sums = worker.generate(Prompts("train", 1, (0, 1), 4, 1.0))
    batch = Batch.from_frame(frame, "engine")[1]
    assert not batch.ref_logprobs.size and len(plain) == len(batch)  # a loss without KL reads none
    lengths, score = batch.response_lengths, sums["critic/score/mean"]
    overlong = np.maximum(0, lengths - 4) / 36 * 2
    assert sums["critic/overlong_penalty/mean"] == pytest.approx(overlong.sum())
    groups = batch.rewards.reshape(2, 4)
    np.testing.assert_allclose(batch.advantages.reshape(2, 4), groups - groups.mean(1, keepdims=True), atol=1e-6)
    kl = (score - overlong.sum() - batch.rewards.sum()) / 0.5
    assert abs(kl) > 1e-3 and np.sign(kl) == np.sign(sums["actor/reward_kl_penalty"])
    told, _, sums = worker.generate(Prompts("val", 0, (0, 1), 1, 1.0))
    assert set(Batch.from_frame(told, "engine")[1].rewards) <= {0, 1} and "critic/score/mean" not in sums


def test_weights_of_another_tick_or_size_are_refused(worker: RolloutWorker):
    flat = worker.engine.plain.weights.master.numpy().copy()
    with pytest.raises(FrameError, match="stage 0: tick: expected 8, got 7"):
        worker.load_weights(8, whole(7, flat))
    with pytest.raises(FrameError, match="all stages: weights"):
        worker.load_weights(8, whole(8, flat[:-1]))


def test_a_prompt_that_is_too_long_is_refused_with_the_knob():
    with pytest.raises(PromptTooLong, match=r"10 tokens, grpo.max_prompt_length is 9"):
        ask(make_worker(max_prompt_length=9), (0,))


def test_a_chat_template_is_applied_up_to_where_the_answer_begins(tmp_path: Path):
    shutil.copytree(BUILTIN / "tiny", tmp_path / "model")
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}#{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}??{% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    worker = make_worker(
        model=ModelConfig(path=str(tmp_path / "model")),
        task=TaskConfig(chat=True, instruction="1+"),
        max_prompt_length=20,
    )
    batch = ask(worker, (0, 1))
    for i in range(2):
        one = batch.take(4 * i, 4 * i + 1)
        shown = worker.tokenizer.decode(one.tokens[: one.prompt[0]])
        assert shown == f"#1+{worker.tasks.task.example('train', i).prompt}??"


def test_rewards_of_ones_own_are_in_the_batch_and_in_the_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_length_reward.py").write_text(
        "def score(prompt, response, answer, metadata):\n"
        "    return -1.5 if metadata['truncated'] else sum(map(ord, response)) / 64 + len(metadata['digits'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = make_worker(task=TaskConfig(reward="own_length_reward:score"), max_response_length=10)
    batch = ask(worker, tuple(range(4)), n=8)
    samples = [batch.take(i, i + 1) for i in range(len(batch))]
    texts = [worker.tokenizer.decode(s.tokens[s.prompt[0] :], skip_special_tokens=True) for s in samples]
    expected = [-1.5 if s.truncated[0] else sum(map(ord, text)) / 64 + 5 for s, text in zip(samples, texts)]
    np.testing.assert_array_equal(batch.rewards, np.array(expected, np.float32))
    assert len(set(expected)) > 2 and batch.truncated.any()
    groups = batch.rewards.reshape(-1, 8)
    centred = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(batch.advantages.reshape(-1, 8), centred, rtol=1e-4, atol=1e-5)


def test_the_engine_is_compared_with_a_plain_forward_every_so_many_steps(worker: RolloutWorker):
    def compared(split: str, step: int) -> dict[str, float]:
        return worker.generate(Prompts(split, step, (0, 1, 2), 4, 0.8))[2]

    assert compared("train", 2) == compared("val", 1) == {}
    frame, _, sums = worker.generate(Prompts("train", 3, (0, 1, 2), 4, 0.8))
    first = [Batch.from_frame(frame, "engine")[1].take(i, i + 1).response_tokens for i in (0, 4, 8)]
    assert sums[f"{mismatch.PREFIX}tokens"] == sum(first)
    found = mismatch.dense_metrics([sums])
    assert abs(found["rollout_corr/dense_k3"]) < 1e-6 and found["rollout_corr/dense_corr"] > 0.9999


def test_new_weights_are_acknowledged_with_the_digest_of_what_is_in_use(worker: RolloutWorker):
    flat = worker.engine.plain.weights.master.numpy().copy()
    assert worker.load_weights(9, whole(9, flat)) == digest(flat)
    assert worker.load_weights(10, whole(10, -flat)) == digest(-flat) != digest(flat)
    worker.load_weights(11, whole(11, flat))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import time\n    time.sleep(1000)", "was not done after 2 s (task.reward_timeout_s)"),
        ("import sys\n    sys.exit()", "raised SystemExit"),
        ("import os\n    os._exit(3)", "ended its process (exit code 3)"),
        ("import os\n    os.abort()", "ended its process (signal SIGABRT)"),
        ("return 1e39", "returned 1e+39"),
        ("return 1e20 * len(response)", "1e+15 at most"),
    ],
)
def test_a_reward_that_hangs_or_ends_is_named_with_its_sample_and_the_engine_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, says: str
):
    (tmp_path / "own_bad_reward.py").write_text(f"def score(prompt, response, answer, metadata):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    task = TaskConfig(reward="own_bad_reward:score", reward_timeout_s=2.0, reward_failures=1)
    worker = make_worker(task=task, max_response_length=5)
    with pytest.raises(RewardError) as failed:
        ask(worker, (0,))
    prompt = worker.tasks.task.example("train", 0).prompt
    assert all(part in str(failed.value) for part in ("own_bad_reward:score", says, repr(prompt)))
    assert worker.load_weights(1, whole(1, worker.engine.plain.weights.master.numpy().copy()))


def test_answers_that_were_not_decided_are_counted_and_become_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": f"{i % 10}+{i // 10}=", "answer": "1"} for i in range(100)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    worker = make_worker(task=TaskConfig(name=f"jsonl:{tmp_path}/rows.jsonl"), max_response_length=5)
    prompts = Prompts("train", 2, (0, 1), 4, 1.0)
    assert UNDECIDED not in worker.generate(prompts)[2]
    monkeypatch.setattr(worker.tasks.task.formulas, "_undecided", 2)
    found = worker.generate(prompts)
    assert found[2] == {UNDECIDED: 2} and worker.generate(prompts)[2] == {}
    rollouts, events = Rollouts.__new__(Rollouts), []
    rollouts.config, rollouts.progress = load("k5"), Progress(None)
    monkeypatch.setattr(rollouts.progress, "event", lambda name, **fields: events.append((name, fields)))
    monkeypatch.setattr(rollouts, "_keep", lambda *_: None)
    rollouts._taken("train", [found])
    assert events == [("answers undecided", {"split": "train", "count": 2})]


REWARD = """
def score(prompt, response, answer, metadata):
    if len(response) % 2:
        raise LookupError("odd")
    return {"length": len(response) / 8, "constant": 0.25}
"""


def test_parts_and_failures_of_rewards_reach_metrics_events_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_parts_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    task = TaskConfig(reward="own_parts_reward:score", reward_weights={"constant": 2.0}, reward_failures=99)
    worker = make_worker(task=task, max_response_length=10)
    results = [worker.generate(Prompts("train", 2, (16 + i,), 8, 1.0)) for i in range(3)]
    events: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    told = SimpleNamespace(
        event=lambda step, tick, name, **fields: events.append({"event": name} | fields),
        samples=lambda step, tick, make: samples.extend(make()),
    )
    config = load("k5", ["grpo.group_size=8", "grpo.train_batch_size=16", "task.reward=own_parts_reward:score"])
    rollouts = Rollouts(config, Progress(told), SimpleNamespace())
    rollouts.progress.step = 2
    batch, found = rollouts._taken("train", results)
    good = np.array([len(text) % 2 == 0 for text in answers_of(worker, batch)])
    lengths = np.array([len(text) / 8 for text in answers_of(worker, batch)])
    assert 0 < good.sum() < len(batch) == 24
    np.testing.assert_array_equal(batch.rewards, np.where(good, lengths + 0.5, 0).astype(np.float32))
    assert found["critic/rewards/length/mean"] == pytest.approx(lengths[good].mean())
    assert found["critic/rewards/constant/mean"] == 0.25
    (event,) = events
    first = int(np.flatnonzero(~good)[0])
    assert event["event"] == "reward failed" and event["count"] == 24 - good.sum() and event["split"] == "train"
    assert event["reward"] == "own_parts_reward:score" and event["reason"] == "raised LookupError: odd"
    assert event["prompt"] == worker.tasks.task.example("train", 16 + first // 8).prompt
    assert event["response"] == answers_of(worker, batch)[first]
    assert [s["problem"] for s in samples] == [16] * 8 + [17] * 8  # of samples.prompts = 2
    expected = [{"length": length, "constant": 0.25} if ok else None for length, ok in zip(lengths, good)]
    assert [s.get("parts") for s in samples] == expected[:16]
    assert [s["response"] for s in samples] == answers_of(worker, batch)[:16]


def answers_of(worker: RolloutWorker, batch: Batch) -> list[str]:
    return [worker.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in batch.split()[1]]
