"""The codecs on a GPU: the same laws as on a CPU, and the same numbers up to the rounding of products."""

from __future__ import annotations

import pytest
import torch

from codec.boundary import Boundary
from codec.config import CodecConfig
from codec.ledger import Ledger
from codec.rows import Rows
from codec.vector import EntropyVector, SignVector, VectorCoder
from tests.unit.codec.test_codecs import CONFIGS, HIDDEN, Stream, refresh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on(device: str, rows: Rows) -> Rows:
    return Rows(rows.first.to(device), rows.keeper.to(device), rows.keys.to(device))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_gpu_and_a_cpu_keep_equally_much(config: CodecConfig):
    found = []
    for device in ("cpu", "cuda"):
        b, stream = Boundary(config, 0, HIDDEN, 3, Ledger()).to(torch.device(device)), Stream()
        for _ in range(3):
            refresh(b, b, "fwd"), refresh(b, b, "bwd")
            b.begin_tick()
            x, dx, rows = stream.micro()
            x, dx, rows = x.to(device), dx.to(device), on(device, rows)
            x_hat = b.decode(b.encode(x, rows, observe=True), rows, x.dtype)
            dx_hat = b.decode_backward(b.encode_backward(dx, rows), rows, dx.dtype)
            assert x_hat.device.type == dx_hat.device.type == device
        found.append((b.health("fwd").get("codec/fvu", 0.0), b.health("bwd")["codec/dx_cosine"]))
    assert found[0] == pytest.approx(found[1], rel=0.02, abs=1e-6)


@pytest.mark.parametrize("coder", ["fixed", "entropy"])
def test_both_ends_agree_on_a_gpu_and_across_devices(coder: str):
    """A body made on a GPU decodes on a CPU to the same coefficients: rows differ by the last product alone."""
    config = CodecConfig(coder=coder, total_rate=0.2)
    gpu, cpu = (Boundary(config, 0, HIDDEN, 3, Ledger()).to(torch.device(d)) for d in ("cuda", "cpu"))
    stream = Stream()
    for _ in range(3):
        x, _, rows = stream.micro()
        payload = gpu.encode(x.cuda(), on("cuda", rows), observe=True)
        here = gpu.decode(payload, on("cuda", rows), x.dtype).cpu()
        torch.testing.assert_close(cpu.decode(payload.cpu(), rows, x.dtype), here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("coder", [SignVector(), EntropyVector(0.5), EntropyVector(4)], ids=["sign", "sparse", "fine"])
def test_a_vector_coded_on_a_gpu_is_the_same_on_a_cpu_to_the_bit(coder: VectorCoder):
    """What is decoded depends on the payload alone: replicas on other devices hold the same sum."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    payload, decoded = coder.encode(x.cuda())
    assert decoded.device.type == "cuda"
    assert torch.equal(coder.decode(payload, len(x)), decoded)
    assert torch.equal(coder.decode(payload.cpu(), len(x)), decoded.cpu())
