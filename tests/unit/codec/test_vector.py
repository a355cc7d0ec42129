"""Long vectors in few bits: what is decoded is what the sender knows of, at the bits that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codec.vector import BLOCK, EntropyVector, SignVector, VectorCoder

CODERS: dict[str, VectorCoder] = {"sign": SignVector()} | {f"{b} bits": EntropyVector(b) for b in (0.1, 0.5, 1, 4, 6)}
SIZES = (0, 1, 7, BLOCK, BLOCK + 1, 20_000)


def vector(n: int, seed: int = 0) -> torch.Tensor:
    """Blocks of very different sizes, some of them all zero, some with zeros in them."""
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(3 * torch.randn(n // BLOCK + 1, generator=g)).repeat_interleave(BLOCK)[:n]
    x = torch.randn(n, generator=g) * size
    x[: n // 5] = 0
    x[n // 2 : n // 2 + 3] = 0
    return x


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)
def test_the_receiver_gets_what_the_sender_thinks(coder: VectorCoder, n: int):
    x = vector(n)
    payload, decoded = coder.encode(x)
    assert torch.equal(coder.decode(payload, n), decoded) and decoded.dtype == torch.float32
    least, most = coder.limits(n)
    assert least <= payload.numel() <= most


@pytest.mark.parametrize("bits", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("n", [3_000, 100_000])
def test_a_value_costs_the_bits_that_were_asked_for(bits: float, n: int):
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    payload, decoded = EntropyVector(bits).encode(x)
    once = 8 + 8 + 2 * 20 + 4  # digest, head, counts, how many words
    assert 0.97 * bits * n / 8 < payload.numel() < 1.03 * bits * n / 8 + once
    # not far from the Gaussian bound 4^-bits, where a table of counts is little beside the values
    assert 4.0**-bits < (x - decoded).square().mean() < (1.7 if n > 10_000 else 2.0) * 4.0**-bits


def test_a_sign_is_a_bit_and_its_scale_the_mean():
    x = torch.tensor([3.0, -1.0, 2.0])
    payload, decoded = SignVector().encode(x)
    assert decoded.tolist() == [2.0, -2.0, 2.0] and payload.numel() == 8 + 2 + 1


@pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS)
def test_what_is_owed_stays_bounded(coder: VectorCoder):
    """Of a constant vector, with the error added to the next; also where one value lies far out of its block."""
    x = torch.randn(8 * BLOCK, generator=torch.Generator().manual_seed(0))
    x[-3] = 10.0
    error, rounds = torch.zeros_like(x), 800
    for _ in range(rounds):
        _, decoded = coder.encode(x + error)
        error += x - decoded
    bits = coder.bits if isinstance(coder, EntropyVector) else 0.5  # a sign spends its bit on every value alike
    assert (
        error.norm() < 0.04 / bits * rounds * x.norm()
    )  # of all that was to be sent; at few bits a value's turn is rare


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("coder", [SignVector(), EntropyVector(1)], ids=["sign", "entropy"])
def test_what_is_not_finite_is_refused(coder: VectorCoder, bad: float):
    x = torch.zeros(BLOCK).fill_(bad)
    with pytest.raises(ValueError, match="holds a NaN, an infinity"):
        coder.encode(x)


@pytest.mark.parametrize("coder", [SignVector(), EntropyVector(0.5), EntropyVector(4)], ids=["sign", "sparse", "fine"])
def test_damaged_payloads_are_refused(coder: VectorCoder):
    """33,334 of each: bytes changed, cut off, added, and another length expected."""
    n = 700
    payload = coder.encode(vector(n))[0].numpy()
    rng = np.random.default_rng(0)
    for trial in range(33_334):
        raw, expected = payload.copy(), n
        match trial % 4:
            case 0:
                raw[rng.integers(raw.size)] ^= rng.integers(1, 256)
            case 1:
                raw = raw[: rng.integers(raw.size)]
            case 2:
                raw = np.concatenate([raw, rng.integers(0, 256, rng.integers(1, 9), np.uint8)])
            case _:
                expected = int(rng.choice([0, 1, n - 512, 2 * n, 10**7]))
        with pytest.raises(ValueError, match=r"payload|digest|do not fit|words|signs"):
            coder.decode(torch.from_numpy(raw), expected)


def test_a_payload_that_lies_under_a_right_digest_is_refused_too():
    """Whoever can make a digest can make any field; none may be believed."""
    from codec.vector import _sealed

    coder, n = EntropyVector(2), 700
    body = coder.encode(vector(n))[0].numpy()[8:]
    rng, refused = np.random.default_rng(1), 0
    for _ in range(5_000):
        raw = body.copy()
        raw[rng.integers(raw.size, size=rng.integers(1, 4))] = rng.integers(0, 256)
        try:
            found = coder.decode(_sealed([raw]), n)
            assert found.shape == (n,)
        except ValueError:
            refused += 1
    assert refused > 1_000
