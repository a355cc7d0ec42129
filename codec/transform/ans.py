"""Integers to words and back at the cost their counts tell: the ANS coder of `constriction`, and its errors.

A model is made of integer counts; `constriction` turns them into fixed-point probabilities by single IEEE operations in a
fixed order, so both ends get the same ones. No symbol of a model is impossible, even at a count of 0.

References: Duda 2013, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression
rate of arithmetic coding", arXiv:1311.2540 (its range variant, rANS); Bamler 2022, "Understanding Entropy Coding With
Asymmetric Numeral Systems (ANS): a Statistician's Perspective", arXiv:2201.01741, which `constriction` follows.
"""

from __future__ import annotations

import numpy as np
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue]: a compiled module


class WordWriter:
    """Symbols in the order in which they will be read."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def put(self, symbols: np.ndarray, counts: np.ndarray) -> None:
        """`symbols`: int32 [m] below the length of `counts`, whole numbers [symbols]; as float64 they are taken as they are."""
        if symbols.size:
            self.parts.append((symbols, counts))

    def words(self) -> np.ndarray:
        """uint32, little-endian."""
        coder = stream.stack.AnsCoder()  # a stack: the last symbols first
        for symbols, counts in reversed(self.parts):
            coder.encode_reverse(symbols, _model(counts, lazy=False))
        return coder.get_compressed().astype("<u4")


class WordReader:
    """Raises ValueError, from every method, if the words cannot be what a WordWriter made."""

    def __init__(self, words: np.ndarray):
        try:
            self.coder = stream.stack.AnsCoder(words.astype(np.uint32))
        except ValueError as error:
            raise ValueError(f"the words are damaged: {error}") from error

    def take(self, size: int, counts: np.ndarray, small: bool = False) -> np.ndarray:
        """The next `size` symbols, int32 [size]. `small`: most are near 0, where a search from there on finds them sooner."""
        try:
            return self.coder.decode(_model(counts, lazy=small), size)
        except AssertionError as error:
            raise ValueError(f"the words are damaged: {error}") from error

    def finish(self) -> None:
        """Nothing is left to read."""
        if not self.coder.is_empty():
            raise ValueError(f"the words are damaged: {self.coder.num_valid_bits()} bits are left over")


def _model(counts: np.ndarray, lazy: bool) -> object:
    """`lazy` decides how a symbol is searched for, not what is found: by adding up counts from 0, not in halves of a table."""
    return stream.model.Categorical(counts.astype(np.float64, copy=False), perfect=False, lazy=lazy)
