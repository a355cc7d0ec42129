"""Coders of transform coefficients: bits come back bit for bit, cost what the theory says, and damage is refused."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from codec.transform import ans, symbols
from codec.transform.entropy import EntropyCoder
from codec.transform.fixed import FixedCoder
from codec.transform.lloyd_max import DISTORTION, MAX_BITS, allocate, levels, thresholds
from tests.unit.codec.test_fuzz import bounded_memory, mutate

LAW = settings(deadline=None, derandomize=True, max_examples=100)
DEVIATIONS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 2.0**20, width=32))


def gaussian(n: int, deviations: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(n, len(deviations), generator=torch.Generator().manual_seed(seed)) * deviations


def laplacian(n: int, deviations: Tensor, seed: int = 0) -> Tensor:
    uniform = torch.rand(n, len(deviations), generator=torch.Generator().manual_seed(seed)) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-9).log() * deviations / 2**0.5


def falling(k: int) -> Tensor:
    """Deviations like those of a basis of principal directions."""
    return 40 * torch.exp(-torch.arange(k) / (k / 6))


# --- Lloyd-Max ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
def test_levels_are_optimal_and_have_the_distortion_that_bits_are_dealt_by(bits: int):
    x = np.linspace(-9, 9, 400_001)
    weight = np.exp(-0.5 * x**2)
    weight /= weight.sum()
    y = levels(bits)
    cell = np.searchsorted(thresholds(bits), x)
    assert (weight * (x - y[cell]) ** 2).sum() == pytest.approx(DISTORTION[bits], abs=1e-9)
    mass = np.bincount(cell, weight)
    assert np.bincount(cell, weight * x) / mass == pytest.approx(y, abs=1e-3)  # each level is the mean of its cell
    assert np.array_equal(y, -y[::-1]) and (np.diff(y) > 0).all()


def greedy(deviations: np.ndarray, bits_per_row: int) -> np.ndarray:
    """One bit after the other, each to the first coefficient that it helps most."""
    bits = np.zeros(deviations.size, np.uint8)
    for _ in range(bits_per_row):
        gains = [
            float(d) ** 2 * (DISTORTION[b] - DISTORTION[b + 1]) if b < MAX_BITS else 0.0
            for d, b in zip(deviations, bits)
        ]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        bits[best] += 1
    return bits


@LAW
@given(DEVIATIONS, st.integers(0, 120))
def test_bits_go_where_a_literal_greedy_search_puts_them(deviations: np.ndarray, bits_per_row: int):
    bits = allocate(deviations, bits_per_row)
    assert np.array_equal(bits, greedy(deviations, bits_per_row))
    assert bits.sum() == min(bits_per_row, MAX_BITS * np.count_nonzero(deviations))


def test_ties_go_to_the_lower_index_and_a_deviation_of_zero_gets_nothing():
    assert allocate(np.array([0, 1, 1, 0, 1], np.float32), 5).tolist() == [0, 2, 2, 0, 1]
    assert allocate(np.array([1, 0], np.float32), 99).tolist() == [MAX_BITS, 0]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_deviations_that_cannot_be_are_refused(bad: float):
    deviations = torch.tensor([1.0, bad])
    for make in (FixedCoder, EntropyCoder):
        with pytest.raises(ValueError, match="finite and not negative"):
            make(deviations)


# --- fixed -------------------------------------------------------------------------------------


@LAW
@given(DEVIATIONS, st.integers(0, 9), st.integers(0, 300), st.integers(0, 99))
def test_both_ends_of_the_fixed_coder_have_the_same_rows_and_the_size_is_known(deviations, n, bits_per_row, seed):
    sigma = torch.from_numpy(deviations)
    z = gaussian(n, sigma, seed)
    sender, receiver = FixedCoder(sigma), FixedCoder(sigma.clone())
    body, z_hat = sender.encode(z, bits_per_row)
    assert body.dtype == torch.uint8 and body.numel() == receiver.size(n, bits_per_row)
    assert body.numel() <= n * bits_per_row / 8 + MAX_BITS + 1  # each width and the gains end in a whole byte
    assert torch.equal(receiver.decode(body, n, bits_per_row), z_hat)
    assert not z_hat[:, sigma == 0].any()


def test_every_coefficient_goes_to_its_nearest_level():
    """Times the gain of its row, a power of the root of 2; here the coefficients are so alike that it is 1."""
    sigma = torch.linspace(1, 2, 300)
    z = gaussian(100, sigma)
    z_hat = FixedCoder(sigma).encode(z, 906)[1]
    for i, bits in enumerate(allocate(sigma.numpy(), 900)):
        error = (z[:, i, None] - torch.tensor(levels(int(bits))).float() * sigma[i]).abs().amin(1)
        assert torch.allclose((z[:, i] - z_hat[:, i]).abs(), error, atol=float(sigma[i]) / 128)  # a cell of the table


@pytest.mark.parametrize("bits_per_row", [600, 1200, 2400])
def test_a_gaussian_loses_what_the_theory_says(bits_per_row: int):
    sigma = torch.linspace(1, 3, 512)  # so many alike that the gain of every row is 1
    z = gaussian(3000, sigma)
    _, z_hat = FixedCoder(sigma).encode(z, bits_per_row)
    bits = allocate(sigma.numpy(), bits_per_row - 6)
    theory = (sigma.double() ** 2 * torch.tensor(DISTORTION, dtype=torch.float64)[bits.astype(int)]).sum()
    assert (z - z_hat).square().sum(1).mean().item() == pytest.approx(theory.item(), rel=0.02)


@LAW
@given(st.integers(-20, 4), st.integers(0, 99))
def test_rows_lose_the_same_share_whatever_their_energy(octaves: int, seed: int):
    sigma = falling(30)
    coder, z = FixedCoder(sigma), gaussian(5, sigma, seed)
    scale = 2.0**octaves
    assert torch.equal(coder.encode(z * scale, 90)[1], coder.encode(z, 90)[1] * scale)


def test_a_row_of_zeros_stays_one_and_a_far_outlier_is_clamped():
    coder = FixedCoder(torch.ones(50))
    z = gaussian(3, torch.ones(50))
    z[1] = 0
    z[2] *= 1e30
    z_hat = coder.encode(z, 100)[1]
    assert not z_hat[1].any() and torch.isfinite(z_hat).all()
    assert 100 < z_hat[2].abs().max() < 1000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("make", [FixedCoder, EntropyCoder])
def test_a_coefficient_that_is_no_number_is_refused(make, bad: float):
    with pytest.raises(ValueError, match="cannot be"):
        make(torch.ones(3)).encode(torch.tensor([[1.0, 2.0, bad]]), 30)


# --- symbols and words -------------------------------------------------------------------------

EDGES = sorted(
    {0, 2**31 - 1, *(m for e in range(1, 31) for m in (2**e - 1, 2**e, 3 * 2 ** (e - 1) - 1, 3 * 2 ** (e - 1)))}
)


def test_symbols_follow_the_magnitudes_in_order_and_leave_just_the_bits_that_are_missing():
    magnitude = np.array(EDGES, np.int32)
    symbol = symbols.symbols_of(magnitude)
    assert (np.diff(symbol) >= 0).all() and symbol[-1] == symbols.SYMBOLS - 1
    assert np.array_equal(symbol[:9], magnitude[:9])
    large = symbol >= symbols.DIRECT
    smallest, bits = symbols.plain_bits(symbol[large])
    rest = magnitude[large] - smallest
    assert (0 <= rest).all() and (rest < 1 << bits).all()
    following, _ = symbols.plain_bits(symbol[large] + 1)
    assert np.array_equal(following - smallest, 1 << bits)


@LAW
@given(st.lists(st.integers(0, 30).flatmap(lambda b: st.tuples(st.integers(0, 2**b - 1), st.just(b))), max_size=40))
def test_plain_bits_come_back(pairs: list[tuple[int, int]]):
    values, lengths = (np.array(column, np.int64) for column in zip(*pairs)) if pairs else (np.zeros(0, np.int64),) * 2
    packed = symbols.pack_bits(values, lengths)
    assert packed.size == -(-lengths.sum() // 8)
    assert np.array_equal(symbols.unpack_bits(packed, lengths), values)


@LAW
@given(st.lists(st.lists(st.integers(0, 6), max_size=30), max_size=5), st.integers(0, 99))
def test_words_come_back_in_order_also_where_the_model_was_sure_of_something_else(parts: list[list[int]], seed: int):
    rng = np.random.default_rng(seed)
    counts = [np.maximum(1, rng.geometric(10.0 ** -rng.integers(0, 7), 7)) for _ in parts]
    writer = ans.WordWriter()
    for part, count in zip(parts, counts):
        writer.put(np.array(part, np.int32), count)
    reader = ans.WordReader(writer.words())
    assert [reader.take(len(part), count).tolist() for part, count in zip(parts, counts)] == parts
    reader.finish()


# --- entropy -----------------------------------------------------------------------------------


class Link:
    """Both ends of one direction; whatever crosses it is checked to arrive as it was sent."""

    def __init__(self, deviations: Tensor):
        self.sender, self.receiver = EntropyCoder(deviations), EntropyCoder(deviations.clone())

    def send(self, z: Tensor, step: float):
        body, z_hat, stats = self.sender.encode(z, step)
        arrived = self.receiver.decode(body, len(z), step)
        assert arrived.dtype == torch.float32 and torch.equal(arrived, z_hat)
        assert self.sender.digest() == self.receiver.digest()
        assert not z.numel() or (z.double() - z_hat).abs().max() <= 0.901 * step + 1e-6 * z.abs().max()
        assert 8 * body.size <= 1.03 * stats.bits + 160
        return body, z_hat, stats


IN_FLOAT32 = [m if m < 2**24 else m & ~0xFF for m in EDGES]
MAGNITUDES = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from(IN_FLOAT32))
WHOLE_STEPS = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.builds(int.__mul__, MAGNITUDES, st.sampled_from([1, -1])),
)


@LAW
@given(WHOLE_STEPS, st.sampled_from([1.0, 2.0**-30, 2.0**20]), st.integers(0, 99))
def test_whole_steps_come_back_exactly_however_large(q: np.ndarray, step: float, seed: int):
    link = Link(torch.rand(q.shape[1], generator=torch.Generator().manual_seed(seed)) * step)
    z = torch.from_numpy(q.astype(np.float32)) * step
    for _ in range(3):
        _, z_hat, stats = link.send(z, step)
        assert torch.equal(z_hat, z)
        assert stats.escapes == np.count_nonzero(np.abs(q) >= symbols.DIRECT)


@LAW
@given(DEVIATIONS, st.integers(0, 9), st.integers(-6, 20), st.integers(0, 99))
def test_both_ends_of_the_entropy_coder_have_the_same_rows(deviations: np.ndarray, n: int, octaves: int, seed: int):
    sigma = torch.from_numpy(deviations)
    link = Link(sigma)
    for i in range(3):
        link.send(laplacian(n, sigma, seed + i), 2.0**octaves)


def test_nothing_costs_next_to_nothing():
    link = Link(falling(64))
    assert link.send(torch.zeros(0, 64), 1.0)[0].size == 4
    link.send(torch.zeros(1000, 64), 1.0)
    body, z_hat, _ = link.send(torch.zeros(8000, 64), 1.0)
    assert not z_hat.any() and body.size < 500  # less than half a bit for a row of zeros


def entropy_of(q: Tensor) -> float:
    """Bits of integers, each column with its own true histogram."""
    total = 0.0
    for column in q.T:
        share = torch.unique(column, return_counts=True)[1] / len(column)
        total -= len(column) * float((share * share.log2()).sum())
    return total


@pytest.mark.parametrize("step", [1.0, 4.0, 16.0])
def test_what_was_learnt_is_worth_the_true_histograms(step: float):
    sigma = falling(96)
    link, used, rows = Link(sigma), 0, []
    for i in range(14):
        body, z_hat, _ = link.send(laplacian(500, sigma, i), step)
        if i >= 4:
            used += 8 * body.size
            rows.append((z_hat / step).round())
    assert used < 1.05 * entropy_of(torch.cat(rows))  # of that, 1 to 4 % are energies, which do not pay here


def test_rows_that_differ_in_energy_cost_less_than_equal_ones_with_the_same_spectrum():
    sigma = falling(64)
    energy = 2 ** torch.randint(-8, 1, (600, 1), generator=torch.Generator().manual_seed(5)).float()
    mixed, same = Link(sigma), Link(sigma)
    for i in range(6):
        z = laplacian(600, sigma, i)
        shuffled = (z * energy).reshape(-1, 64)
        for j in range(64):  # the same values in every column, no longer in the same rows
            shuffled[:, j] = shuffled[torch.randperm(600, generator=torch.Generator().manual_seed(j)), j]
        mixed_bytes, same_bytes = mixed.send(z * energy, 2.0)[0].size, same.send(shuffled, 2.0)[0].size
    assert mixed_bytes < 0.85 * same_bytes


def test_both_ends_stay_in_step_while_everything_moves():
    sigma = falling(48)
    link = Link(sigma)
    for i in range(60):
        if i % 7 == 6:
            sigma = sigma[torch.randperm(48, generator=torch.Generator().manual_seed(i))] * 1.5
            link.sender.rebase(sigma)
            link.receiver.rebase(sigma.clone())
        link.send(laplacian(i * 13 % 40, sigma, i) * 3.0 ** (i % 4 - 2), 2.0 ** (i % 9 - 4))


def test_histograms_outlive_a_change_of_basis_and_step():
    sigma = falling(64)
    link, stayed = Link(sigma), EntropyCoder(sigma)
    cold = link.send(laplacian(300, sigma, 0), 3.0)[0].size
    for i in range(1, 8):
        link.send(laplacian(300, sigma, i), 3.0)
    stayed.restore(link.sender.state())
    other = sigma.flip(0) * 16
    link.sender.rebase(other)
    link.receiver.rebase(other)
    moved = link.send(laplacian(300, other, 0), 48.0)[0].size
    assert moved == pytest.approx(stayed.encode(laplacian(300, sigma, 0), 3.0)[0].size, rel=0.01)
    assert moved < 0.98 * cold


def test_a_restored_coder_goes_on_bit_for_bit():
    sigma = falling(40)
    link = Link(sigma)
    for i in range(5):
        link.send(laplacian(50, sigma, i), 2.0)
    saved = link.sender.state()
    again = Link(torch.ones(40))
    for end in (again.sender, again.receiver):
        end.restore(saved)
    for i in range(5, 9):
        z = laplacian(50, sigma, i)
        assert np.array_equal(link.send(z, 2.0)[0], again.send(z, 2.0)[0])
    assert again.sender.digest() == link.sender.digest()
    other = EntropyCoder(sigma)
    other.restore(saved)  # what was saved is a copy: the rounds since then have not moved it
    assert other.digest() != link.sender.digest()


def test_a_state_of_other_coefficients_is_refused():
    with pytest.raises(ValueError, match="deviations"):
        EntropyCoder(torch.ones(5)).restore(EntropyCoder(torch.ones(6)).state())


def test_the_digest_sees_one_changed_number_anywhere():
    sigma = falling(10)
    coder = EntropyCoder(sigma)
    state, seen = coder.state(), {coder.digest()}
    for name, values in state.items():
        for i in range(0, values.numel(), 101):
            changed = {key: value.clone() for key, value in state.items()}
            changed[name].view(-1)[i] += 1
            coder.restore(changed)
            assert coder.digest() not in seen
            seen.add(coder.digest())
    coder.restore(state)
    assert coder.digest() in seen and coder.digest().bit_length() <= 64


def test_a_lost_payload_shows_in_the_digest():
    sigma = falling(10)
    sender, receiver = EntropyCoder(sigma), EntropyCoder(sigma)
    sender.encode(laplacian(20, sigma), 1.0)
    assert sender.digest() != receiver.digest()


def test_bodies_are_the_same_on_every_machine():
    """A change of any of these digests is a change of what crosses the link."""
    z = (torch.arange(40 * 24).view(40, 24) * 7919 % 2017 - 1008) / 16 * 2.0 ** -(torch.arange(24) // 3)
    sigma = 60 * 2.0 ** -(torch.arange(24) // 3)
    coder = EntropyCoder(sigma)
    bodies = [coder.encode(z * scale, 0.5)[0] for scale in (1, 100, 0.1, 0)]
    bodies.append(FixedCoder(sigma).encode(z, 70)[0].numpy())
    assert [xxhash.xxh3_64_hexdigest(body) for body in bodies] == [
        "58373832d649c228",
        "679dd227e89b7e7a",
        "16765bee616648a4",
        "48b2c92616fc193d",
        "a0c0c6a46eb4ebd6",
    ]
    assert f"{coder.digest():016x}" == "0002f99432355188"


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf, 1e-60, 1e60])
def test_a_step_that_cannot_be_is_refused(step: float):
    with pytest.raises(ValueError, match="step"):
        EntropyCoder(torch.ones(2)).encode(torch.ones(1, 2), step)


def test_coefficients_of_2_to_the_31_steps_are_refused_and_nothing_is_learnt():
    coder = EntropyCoder(torch.ones(2))
    before = coder.digest()
    with pytest.raises(ValueError, match=r"2\.14748e\+09 steps of 0\.5"):
        coder.encode(torch.tensor([[1.0, -(2.0**30)]]), 0.5)
    assert coder.digest() == before


def test_a_coder_that_was_rebased_or_restored_expects_what_a_new_one_does():
    """Whatever it has kept of the step and the basis before."""
    before, after = 4 * torch.ones(8), torch.arange(1.0, 9.0)
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * after
    fresh = EntropyCoder(after)
    start, body = fresh.state(), fresh.encode(z, 0.5)[0]
    rebased, restored = EntropyCoder(before), EntropyCoder(before)
    for coder in (rebased, restored):
        counts = coder.state()
        coder.encode(z, 0.5)
        coder.restore(counts)
        coder.encode(z, 0.5)
        coder.restore(counts)
    rebased.rebase(after)
    restored.restore(start)
    for coder in (rebased, restored):
        assert np.array_equal(coder.encode(z, 0.5)[0], body) and coder.digest() == fresh.digest()


# --- damage ------------------------------------------------------------------------------------

CASES = {"entropy": 80_000, "fixed": 20_000}
ROWS, WIDTH = 6, 5
REFUSALS = ("a body is a row", "words do not fit", "the words are damaged", "bytes of plain bits")


def damaged(rng: random.Random, honest: list[bytes]) -> np.ndarray:
    data = bytearray(rng.choice(honest))
    match rng.randrange(8):
        case 0:
            data = bytearray(rng.randbytes(rng.randrange(40)))
        case 1:  # another count of words
            data[:4] = rng.choice([0, 1, 2, len(data) // 4 - 1, len(data) // 4, 2**30, 2**32 - 1]).to_bytes(4, "little")
        case 2:  # plausible length, wild words
            data[4:] = rng.choices([0, 1, 0x7F, 0x80, 0xFF], k=len(data) - 4)
        case _:
            mutate(rng, data)
    return np.frombuffer(bytes(data), np.uint8)


def wild_rows() -> list[Tensor]:
    z = gaussian(ROWS, torch.ones(WIDTH), 3)
    return [z, z * 100, z * 1e8, z * torch.tensor([0.0, 1, 0, 1e4, 1e-3, 1]).view(ROWS, 1), torch.zeros_like(z)]


def test_damaged_bodies_of_the_entropy_coder_are_refused_or_harmless_and_teach_nothing():
    coder, rng, outcomes = EntropyCoder(falling(WIDTH)), random.Random("entropy"), Counter()
    state, before = coder.state(), coder.digest()
    honest = []
    for z in wild_rows():
        honest.append(coder.encode(z, 1.0)[0].tobytes())
        coder.restore(state)
    with bounded_memory():
        for _ in range(CASES["entropy"]):
            body = damaged(rng, honest)
            try:
                rows = coder.decode(body, ROWS, 1.0)
            except ValueError as error:
                outcomes[next((name for name in REFUSALS if name in str(error)), "unnamed")] += 1
            else:
                outcomes["accepted"] += 1
                assert rows.shape == (ROWS, WIDTH) and torch.isfinite(rows).all()
                coder.restore(state)
    assert coder.digest() == before
    assert not outcomes["unnamed"] and min(outcomes[name] for name in (*REFUSALS, "accepted")) > CASES["entropy"] / 50


def test_damaged_bodies_of_the_fixed_coder_are_refused_or_harmless():
    coder, rng, outcomes = FixedCoder(falling(WIDTH)), random.Random("fixed"), Counter()
    honest = [coder.encode(z, 20)[0].numpy().tobytes() for z in wild_rows()]
    with bounded_memory():
        for _ in range(CASES["fixed"]):
            body = torch.from_numpy(damaged(rng, honest).copy())
            try:
                rows = coder.decode(body, ROWS, 20)
            except ValueError as error:
                assert "rows of 20 bits are" in str(error)
                outcomes["refused"] += 1
            else:
                outcomes["accepted"] += 1
                assert rows.shape == (ROWS, WIDTH) and torch.isfinite(rows).all()
    assert min(outcomes.values()) > CASES["fixed"] / 20


@pytest.mark.parametrize("body", [np.zeros(8, np.int8), np.zeros((2, 4), np.uint8), np.zeros(3, np.uint8)])
def test_what_is_no_body_at_all_is_refused(body: np.ndarray):
    with pytest.raises(ValueError, match="body"):
        EntropyCoder(torch.ones(2)).decode(body, 1, 1.0)
    with pytest.raises(ValueError, match="body"):
        FixedCoder(torch.ones(2)).decode(torch.from_numpy(body), 1, 8)
    with pytest.raises(ValueError, match="-1 rows"):
        FixedCoder(torch.ones(2)).size(-1, 8)
    with pytest.raises(ValueError, match="-1 rows"):
        EntropyCoder(torch.ones(2)).decode(np.zeros(4, np.uint8), -1, 1.0)
