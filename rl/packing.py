"""Samples as one row of bytes: whole numbers at the bits they need, prompts once, floats without what they repeat.

    which prompt each sample has │ lengths of prompts │ of responses │ tokens of prompts, of responses
    │ truncated (a bit each) │ rewards │ advantages │ weights in the loss (different values, and which)
    │ log-probs (28 bits each)

Lossless, and the size follows from lengths and vocabulary, so that a plan knows it: nothing is compressed by what it
happens to say. Every size is checked against the bytes that are there before anything is allocated for it.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from codec.frames import FrameError

PER_SAMPLE, PER_RESPONSE = ("rewards", "advantages", "loss_weights"), ("rollout_logprobs", "ref_logprobs")
# What is empty is not sent, lengths always are. A bit each, in this order: a new one comes last, as checkpoints hold frames
OPTIONAL = ("tokens", "truncated", "rewards", "advantages", *PER_RESPONSE, "loss_weights")
_SIZE = np.dtype("<u4")
_MANTISSA = 23  # bits of a float32; before them its sign and exponent
_EXPONENTS = 5  # bits for which of the signs and exponents that occur: log-probs of one batch have 15 to 30
_WIDEST = 31  # bits of a whole number
_MOST_TOKENS, _MOST_A_BYTE = 1 << 22, 1 << 10  # more than both is no batch: prompts are repeated within a group only


def pack_samples(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """Fields of a batch that adds up -> bytes, uint8, and which of OPTIONAL they hold, a bit each."""
    tokens, prompt, total = (arrays[name] for name in ("tokens", "prompt", "total"))
    which, lengths, prompts_first = distinct_prompts(tokens, prompt, total)
    parts = [*_whole(which), *_whole(lengths), *_whole(total - prompt)]
    if tokens.size:
        parts += _whole(prompts_first)
    parts.append(np.packbits(arrays["truncated"], bitorder="little"))
    for name in PER_SAMPLE:
        parts += _repeated(arrays[name]) if arrays[name].size else []
    for name in PER_RESPONSE:
        parts += _floats(arrays[name]) if arrays[name].size else []
    return np.concatenate(parts), sum(1 << i for i, name in enumerate(OPTIONAL) if arrays[name].size)


def unpack_samples(body: np.ndarray, samples: int, sent: int, sender: str) -> dict[str, np.ndarray]:
    """Inverse of `pack_samples`. Raises FrameError naming the sender and the field."""
    reader = _Reader(body, sender)
    there = [name for i, name in enumerate(OPTIONAL) if sent >> i & 1]
    if sent >> len(OPTIONAL) or ("tokens" not in there and set(there) & set(PER_RESPONSE)):
        reader.refuse("sent", f"{sent} is no choice of {', '.join(OPTIONAL)}; log-probs need their tokens")
    which = reader.whole(samples, "prompt")
    lengths = reader.whole(int(which.max(initial=-1)) + 1, "prompt")
    prompt, response = lengths[which], reader.whole(samples, "total")
    total = prompt + response
    if (prompt < 1).any() or (total >> _WIDEST).any():
        reader.refuse("prompt", f"a length is below 1, or above 2^{_WIDEST} with its response")
    found = dict.fromkeys(OPTIONAL, np.zeros(0, np.float32)) | {
        "prompt": prompt.astype(np.int32),
        "total": total.astype(np.int32),
        "tokens": reader.tokens(which, lengths, response) if "tokens" in there else np.zeros(0, np.int32),
        "truncated": reader.bits(samples if "truncated" in there else 0, "truncated").astype(bool),
    }
    for name in PER_SAMPLE:
        found |= {name: reader.repeated(samples, name)} if name in there else {}
    for name in PER_RESPONSE:
        found |= {name: reader.floats(int(response.sum()), name)} if name in there else {}
    if reader.left:
        reader.refuse("body", f"{reader.left} bytes are left over")
    return found


def distinct_prompts(
    tokens: np.ndarray, prompt: np.ndarray, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Which prompt each sample has, in order of first use; their lengths; tokens of prompts, then of responses)."""
    ends = np.cumsum(total, dtype=np.int64)
    starts = ends - total
    seen: dict[bytes | int, int] = {}
    which, prompts, responses = [], [tokens[:0]], [tokens[:0]]
    for start, end, length in zip(starts.tolist(), ends.tolist(), prompt.tolist(), strict=True):
        own = tokens[start : start + length]
        key = own.tobytes() if tokens.size else length
        if key not in seen:
            prompts.append(own)
        which.append(seen.setdefault(key, len(seen)))
        responses.append(tokens[start + length : end])
    lengths = np.zeros(len(seen), np.int64)
    lengths[which] = prompt
    return np.array(which, np.int64), lengths, np.concatenate([*prompts, *responses])


# --- numbers ---------------------------------------------------------------------------------------


def _whole(values: np.ndarray, least: int = 1) -> list[np.ndarray]:
    """Whole numbers [m] from 0 up -> their bits a number (at least `least`) in a byte, then those bits, lowest first."""
    width = max(least, int(values.max(initial=0)).bit_length())
    four = values.astype(_SIZE).view(np.uint8).reshape(-1, _SIZE.itemsize)
    bits = np.unpackbits(four, axis=1, count=width, bitorder="little")
    return [np.array([width], np.uint8), np.packbits(bits, bitorder="little")]


def _repeated(values: np.ndarray) -> list[np.ndarray]:
    """Floats [m] -> how many different ones there are, those, and which each is."""
    different, which = np.unique(_patterns(values), return_inverse=True)
    return [_sizes(different.size), _sizes(different), *_whole(which)]


def _floats(values: np.ndarray) -> list[np.ndarray]:
    """Floats [m] -> how many signs and exponents there are, those, which each has, and the mantissas."""
    patterns = _patterns(values)
    different, which = np.unique(patterns >> _MANTISSA, return_inverse=True)
    mantissas = _whole(patterns & (1 << _MANTISSA) - 1, _MANTISSA)
    return [_sizes(different.size), *_whole(different), *_whole(which, _EXPONENTS), *mantissas]


def _patterns(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def _sizes(values: np.ndarray | int) -> np.ndarray:
    return np.atleast_1d(np.asarray(values, _SIZE)).view(np.uint8)


class _Reader:
    """What is left of a body. Every method raises FrameError."""

    def __init__(self, body: np.ndarray, sender: str):
        self.body, self.sender, self.at = body, sender, 0

    @property
    def left(self) -> int:
        return self.body.size - self.at

    def refuse(self, field: str, reason: str) -> NoReturn:
        raise FrameError(self.sender, field, reason)

    def take(self, nbytes: int, field: str) -> np.ndarray:
        if nbytes > self.left:
            self.refuse(field, f"needs {nbytes} bytes, {self.left} are left")
        self.at += nbytes
        return self.body[self.at - nbytes : self.at]

    def bits(self, count: int, field: str) -> np.ndarray:
        return np.unpackbits(self.take(-(-count // 8), field), count=count, bitorder="little")

    def size(self, field: str) -> int:
        return int(self.take(_SIZE.itemsize, field).copy().view(_SIZE)[0])

    def whole(self, count: int, field: str) -> np.ndarray:
        """int64 [count]"""
        width = int(self.take(1, field)[0])
        if not 1 <= width <= _WIDEST:
            self.refuse(field, f"numbers of {width} bits")
        bits = self.bits(count * width, field).reshape(count, width)
        four = np.zeros((count, _SIZE.itemsize), np.uint8)
        four[:, : -(-width // 8)] = np.packbits(bits, axis=1, bitorder="little")
        return four.reshape(-1).view(_SIZE).astype(np.int64)

    def tokens(self, which: np.ndarray, lengths: np.ndarray, response: np.ndarray) -> np.ndarray:
        """int32, each sample's prompt and response, one after the other."""
        distinct = int(lengths.sum())
        found = self.whole(distinct + int(response.sum()), "tokens").astype(np.int32)
        prompts = np.split(found[:distinct], np.cumsum(lengths)[:-1])
        responses = np.split(found[distinct:], np.cumsum(response)[:-1])
        whole = int(lengths[which].sum() + response.sum())
        if whole > max(_MOST_TOKENS, _MOST_A_BYTE * self.body.size):
            self.refuse("tokens", f"{whole} from {self.body.size} bytes")
        pairs = [part for i, own in zip(which.tolist(), responses) for part in (prompts[i], own)]
        return np.concatenate(pairs) if pairs else found

    def repeated(self, count: int, field: str) -> np.ndarray:
        """float32 [count]"""
        different = self.size(field)
        values = self.take(_SIZE.itemsize * different, field).copy().view(_SIZE)
        return self.chosen(values, count, field).astype(np.uint32).view(np.float32)

    def floats(self, count: int, field: str) -> np.ndarray:
        """float32 [count]"""
        exponents = self.whole(self.size(field), field)
        patterns = self.chosen(exponents, count, field) << _MANTISSA | self.whole(count, field)
        return (patterns & (1 << 32) - 1).astype(np.uint32).view(np.float32)

    def chosen(self, values: np.ndarray, count: int, field: str) -> np.ndarray:
        """[count] of the different `values`"""
        which = self.whole(count, field)
        if which.max(initial=-1) >= values.size:
            self.refuse(field, f"value {which.max()} of {values.size}")
        return values[which]
