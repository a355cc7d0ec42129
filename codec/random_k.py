"""k random coordinates of each row, rescaled by H/k: unbiased, and nothing beside the values crosses.

    X̂[i, j] = H/k · X[i, j]   if j is among the k coordinates of row i, else 0       E[X̂] = X over the keys

Both ends draw the coordinates from a key of the row (codec/keyed.py), each way and each boundary its own, so there is no table
and no index to send: 2k bytes a row, values in bf16. The price of having no bias is variance: a row comes back with a mean
square error of (H/k - 1) times its energy, where a projection leaves at most all of it.

References: Konečný, McMahan, Yu, Richtárik, Suresh, Bacon 2016, "Federated Learning: Strategies for Improving Communication
Efficiency", arXiv:1610.05492, for random masks from a seed; Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with Memory",
arXiv:1809.07599, for rand-k.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from codec.config import CodecConfig
from codec.interface import Codec, Room, as_bytes, as_numbers
from codec.keyed import coordinates


class RandomK(Codec):
    """One way of one boundary."""

    keyed = True
    at: Int64[Tensor, "n k"]  # the coordinates of the rows to come

    def __init__(self, hidden: int, k: int, seed: int):
        self.hidden, self.k, self.seed = hidden, k, seed

    def rekey(self, keys: Int64[Tensor, " n"]) -> None:
        self.at = coordinates(keys ^ self.seed, self.hidden, self.k)

    def encode(
        self, x: Float[Tensor, "n h"], room: Room, observe: bool
    ) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, "n h"] | None]:
        """X -> its values at the coordinates, bf16 [n, k]."""
        values = x.gather(1, self.at).bfloat16()
        return as_bytes(values), self._spread(values, x.dtype) if observe else None

    def decode(self, payload: UInt8[Tensor, " bytes"], n: int, dtype: torch.dtype) -> Float[Tensor, "n h"]:
        return self._spread(as_numbers(payload, (n, self.k), torch.bfloat16, "values"), dtype)

    def limits(self, n: int, dtype: torch.dtype) -> tuple[int, int]:
        size = n * self.k * torch.bfloat16.itemsize
        return size, size

    def state(self) -> dict[str, Tensor]:
        return {"seed": torch.tensor(self.seed)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.seed = int(state["seed"])

    def own(self, due: bool) -> bool:
        """All replicas draw from the same seed."""
        return False

    def _spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """bf16 [n, k] -> [n, H], 0 at all other coordinates."""
        wide = torch.zeros(len(values), self.hidden, device=values.device)
        return wide.scatter_(1, self.at, values.float() * (self.hidden / self.k)).to(dtype)


def random_k(config: CodecConfig, hidden: int, seed: int) -> tuple[Codec, Codec]:
    """The two ways of one boundary. Raises ValueError if k exceeds the hidden size."""
    k = config.rank_for(hidden)
    return RandomK(hidden, k, 2 * seed), RandomK(hidden, k, 2 * seed + 1)
