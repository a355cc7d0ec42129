"""Time what a tick adds to plain training, as ratios to a baseline in the same run: `make bench`.

Machines are noisy: medians of interleaved rounds, and only the ratios mean anything elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.medians import medians
from benchmarks.merge_bandwidth import merge_speed
from codec import frames, signs
from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from codec.rows import Rows
from merger import MERGERS
from merger.config import MergerConfig
from swarm.merge_sweep import merge_in_place

HIDDEN, TOKENS, SAMPLES, PARAMETERS = 576, 1024, 4, 4_000_000  # SmolLM2's hidden size
OF_BANDWIDTH = 8_000_000, 100_000_000  # parameters
torch.set_num_threads(1)
torch.manual_seed(0)


def print_ratios(title: str, baseline: str, jobs: dict[str, Callable[[], object]]) -> None:
    found = medians(jobs)
    print(f"{title} (baseline: {baseline}, {found[baseline] * 1e3:.2f} ms)")
    for name, seconds in found.items():
        if name != baseline:
            print(f"  {name:44} {seconds / found[baseline]:8.3f} x  {seconds * 1e3:9.2f} ms")


def stage() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Half of SmolLM2-135M: 15 decoder layers with random weights, and their forward on SAMPLES equal samples."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=15,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    model = LlamaModel(config)
    return model, lambda x: model(inputs_embeds=x.view(SAMPLES, -1, HIDDEN)).last_hidden_state.view(-1, HIDDEN)


def boundary() -> None:
    """A boundary, both ends of both ways, beside the forward and backward of the stage in front of it."""
    spread = 0.99 ** torch.arange(HIDDEN)  # rows with a spectrum, so that bits are spent unevenly
    x, dx = torch.randn(TOKENS, HIDDEN) * spread, torch.randn(TOKENS, HIDDEN) * spread * 1e-4
    _, forward = stage()

    def pass_through_the_stage() -> None:
        forward(x.clone().requires_grad_()).backward(dx)

    def crossing(cut: Boundary, observe: bool) -> None:
        cut.decode(cut.encode(x, rows, observe), rows, x.dtype)
        cut.decode_backward(cut.encode_backward(dx, rows), rows, dx.dtype)

    rows = Rows(torch.arange(TOKENS) % (TOKENS // SAMPLES) == 0, torch.arange(TOKENS), torch.arange(TOKENS))
    jobs: dict[str, Callable[[], object]] = {"stage of 15 layers": pass_through_the_stage}
    for kind in (
        {"kind": "powersgd", "rank_ratio": 0.05},
        {"kind": "random_k", "rank_ratio": 0.05},
        {"coder": "fixed", "total_rate": 0.05},
        {"coder": "entropy", "total_rate": 0.05},
        {"coder": "fixed", "total_rate": 0.125},
        {"coder": "entropy", "total_rate": 0.125},
        {"coder": "entropy", "total_rate": 0.125, "dither": True},
    ):
        cut = Boundary(CodecConfig.model_validate(kind), 0, HIDDEN, 0, Ledger())
        name = ", ".join(str(value) for value in kind.values())
        jobs[f"{name}, both ways"] = lambda cut=cut: crossing(cut, False)
        jobs[f"{name}, with statistics"] = lambda cut=cut: crossing(cut, True)
    print_ratios(f"boundary, H={HIDDEN}, {TOKENS} tokens", "stage of 15 layers", jobs)


def correction() -> None:
    """Merging, and packing and unpacking corrections, beside one Adam step on as many parameters."""
    g, m = torch.randn(PARAMETERS), torch.randn(PARAMETERS)
    parameter = nn.Parameter(torch.randn(PARAMETERS))
    parameter.grad = g.clone()
    adam = torch.optim.AdamW([parameter], lr=1e-6, fused=True)
    merge = MERGERS["signed_ema"](MergerConfig())
    merge.prepare(g, m, 0)
    planes, held = signs.encode(m), signs.planes_of(m)
    frame = frames.pack({}, planes)
    jobs: dict[str, Callable[[], object]] = {
        "Adam step": adam.step,
        "merge signed_ema": lambda: merge_in_place(merge, g, held),
        "encode signs": lambda: signs.encode(m),
        "decode signs": lambda: signs.decode(planes, PARAMETERS),
        "pack a frame of fp32": lambda: frames.pack({}, {"m": m.numpy()}),
        "unpack a frame of sign planes": lambda: frames.unpack(frame, "bench"),
    }
    print_ratios(f"correction, {PARAMETERS:,} parameters", "Adam step", jobs)


def bandwidth() -> None:
    """Merging and packing signs beside a copy: bytes that each must move, over its time, as a share of the copy's."""
    for parameters in OF_BANDWIDTH:
        found = merge_speed(torch.device("cpu"), parameters)
        print(f"bandwidth, {parameters:,} parameters (a copy: {found['copy_gb_s']:.1f} GB/s)")
        for job in ("merge", "encode"):
            print(f"  {job + ' signs':44} {found[f'{job}_share']:8.3f} x  {found[f'{job}_ms']:9.2f} ms")


if __name__ == "__main__":
    boundary()
    correction()
    bandwidth()
