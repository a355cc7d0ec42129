"""Fixtures: small random models on disk, random batches, and ranks in forked processes with real gloo groups."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multiprocessing
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from xdist.scheduler import LoadScopeScheduling

from rl.batch import Batch
from rl.model_files import BUILTIN
from rl.packing import PER_TOKEN
from swarm.meeting import meeting

torch.set_num_threads(1)

CLUSTER = "tests/ray/"
STARTED = pytest.StashKey[tuple[float, float]]()
LONGEST = CLUSTER, "tests/commands/", "tests/chaos/"


class ByCluster(LoadScopeScheduling):
    """One of the processes of `pytest -n` has all tests that share a Ray cluster; of the others a file is never divided.

    Not `--dist loadgroup`: it groups nothing from pytest 9.2 on (pytest-xdist issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return CLUSTER if file.startswith(CLUSTER) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByCluster:
    return ByCluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: so that the two processes end at about the same time."""
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in LONGEST])


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.monotonic(), _busy()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line for each command of the documents (tests/commands), one for each folder, one of how busy the machine was."""
    reports = [r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport)]
    rows = [row for r in reports if r.when == "call" for name, row in r.user_properties if name == "command"]
    if rows:
        terminalreporter.section("commands of the documents")
    for where, text, how, seconds in rows:
        terminalreporter.write_line(f"{where:36} {seconds:6.1f} s  {how:36}  {text[:100]}")
    if (since := config.stash.get(STARTED, None)) is None:
        return
    folders: Counter[str] = Counter()
    for r in reports:
        folders["/".join(r.nodeid.split("/")[:2])] += r.duration
    wall, used = time.monotonic() - since[0], _busy() - since[1]
    terminalreporter.section("seconds by folder")
    terminalreporter.write_line("  ".join(f"{folder} {seconds:.0f}" for folder, seconds in folders.most_common()))
    cores = os.cpu_count() or 1
    terminalreporter.write_line(
        f"the machine: {used:.0f} s of {cores} cores in {wall:.0f} s, {used / wall / cores:.0%}"
    )


def _busy() -> float:
    """Seconds that this machine's cores have worked, for us and for others."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def make_model(
    folder: Path, tied: bool, layers: int = 4, hidden: int = 32, vocab: int = 48, positions: int = 128
) -> Path:
    """A random Qwen2 on disk. Larger than usual weights, so that gradients are not all alike."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(params=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_model")


def make_batch(samples: int = 16, vocab: int = 48, seed: int = 0) -> Batch:
    """Random samples of different lengths with random advantages and plausible log-probs."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(3, 6, samples).astype(np.int32)
    response = rng.integers(2, 12, samples).astype(np.int32)
    return Batch(
        tokens=rng.integers(2, vocab, int((prompt + response).sum())).astype(np.int32),
        prompt=prompt,
        total=prompt + response,
        rollout_logprobs=rng.normal(-3.5, 0.5, int(response.sum())).astype(np.float32),
        ref_logprobs=np.zeros(0, np.float32),
        rewards=rng.integers(0, 2, samples).astype(np.float32),
        advantages=rng.normal(0, 1, samples).astype(np.float32),
        truncated=np.zeros(samples, bool),
    )


def with_environment(batch: Batch, seed: int = 0) -> Batch:
    """The same tokens, of which about a third is an environment's: of some samples the last ones, of some all or none."""
    rng = np.random.default_rng(seed)
    own = rng.random(batch.response_tokens) < 0.65
    if own.size:
        own[0] = False
    logprobs = {name: getattr(batch, name) for name in PER_TOKEN}
    cut = {name: array[own] if array.size else array for name, array in logprobs.items()}
    return replace(batch, own=own, **cut)


def on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(rank, init, *args)` in `world` forked processes; their results, or the first traceback."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, work, rank, args), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        _store, init = meeting("127.0.0.1")  # after the forks: it has a thread
        for pipe in pipes:
            pipe.send(init)
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(120):
                raise TimeoutError(f"rank {rank} of {world} did not answer in 120 s")
            ok, result = pipe.recv()
            assert ok, f"rank {rank}:\n{result}"
            results.append(result)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _child(pipe: Any, work: Callable[..., Any], rank: int, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send((True, work(rank, pipe.recv(), *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # a forked child must not run the parent's exit handlers


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """The built-in policy with a chat template: one token before a message, two where the answer begins."""
    folder = tmp_path / "chat-model"
    shutil.copytree(BUILTIN / "tiny", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}#{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}??{% endif %}"
    )
    return folder
