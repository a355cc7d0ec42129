"""An engine in a process of its own, as in a run: vLLM starts torch.distributed and must not do so in a test's."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.config import ModelConfig, RolloutConfig
from rl.engine import Engine, Key, PlainModel, Samples
from rl.rollout import ENGINES
from rl.stops import StopTexts
from rl.tokenizer import has_tokenizer, load_tokenizer

LENGTH = 400
IMPORTED = [__name__, "vllm.entrypoints.llm"]  # ten seconds of a core, once for all engines of a test's process


class EngineHere:
    """Calls `function(engine, *args)`."""

    def __init__(self, kind: str, folder: Path, dtype: str, **rollout: Any):
        self.engine = build(kind, folder, dtype, stops=["a"], **rollout)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.engine, *args)

    def close(self) -> None: ...


class EngineProcess:
    """Calls `function(engine, *args)` over there, for functions of a module."""

    def __init__(self, kind: str, folder: Path, dtype: str, **rollout: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, kind, folder, dtype, rollout), daemon=True)
        self.process.start()
        other.close()  # so that its death ends the wait for an answer
        self._answer()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self.pipe.send((function, args))
        return self._answer()

    def _answer(self) -> Any:
        if not self.pipe.poll(240):
            raise TimeoutError("the engine did not answer in 240 s")
        result, failure = self.pipe.recv()
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def build(
    kind: str,
    folder: Path,
    dtype: str,
    length: int = LENGTH,
    attention: str = "sdpa",
    stops: list[str] | None = None,
    **options: Any,
) -> Engine:
    """`stops`: so that `stop_at` can be said later, if the folder has a tokenizer, which can write them."""
    rollout = RolloutConfig(engine=kind, **({"kv_cache_gb": 0.1} | options))
    plain = PlainModel(folder, ModelConfig(dtype=dtype, attention=attention), rollout)
    if stops and has_tokenizer(folder):
        plain.stops = StopTexts(load_tokenizer(folder), stops)
    engine = ENGINES[kind](plain, rollout, length)
    plain.stops = None
    return engine


def _serve(pipe: Any, kind: str, folder: Path, dtype: str, rollout: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    try:
        engine = build(kind, folder, dtype, stops=["a"], **rollout)
        pipe.send((None, None))
    except Exception as failure:
        traceback.print_exc()
        pipe.send((None, failure))
        os._exit(1)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(engine, *args), None))
        except Exception as failure:
            pipe.send((None, failure))


def sample(
    engine: Engine, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float
) -> Samples:
    return engine.sample(prompts, keys, max_new, temperature)


def stop_at(engine: Engine, texts: list[str]) -> None:
    """Texts that end a turn; none."""
    engine.plain.stops = StopTexts(load_tokenizer(engine.plain.folder), texts) if texts else None


def score(engine: Engine, prompts: list[list[int]], answers: list[np.ndarray], temperature: float) -> list[np.ndarray]:
    return engine.plain.score(prompts, answers, temperature)


def weights(engine: Engine) -> np.ndarray:
    return engine.plain.weights.master.cpu().numpy().copy()


def load(engine: Engine, flat: np.ndarray) -> None:
    engine.plain.weights.master.copy_(torch.from_numpy(flat))
    engine.publish()


def sleep(engine: Engine) -> None:
    engine.sleep()


def save(engine: Engine, folder: Path) -> None:
    """The weights as transformers reads them."""
    engine.plain.model.save_pretrained(folder)
