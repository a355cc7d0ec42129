"""The built-in task: the last digit of a sum of five digits, worked out in the open.

A prompt is `3+8+5+9+2=`. The worked answer writes the running sum mod 10 after each digit, with
a comma between the steps, and closes with the result: `1,6,5,7#7$`, where `$` is the EOS token.
Before closing, the writer may re-check the last step, once or many times: `1,6,5,8?8?7#7$`. So
answers vary in length, and a policy can learn to re-check less or run away re-checking for ever.
`rl/pretrain/demonstrations.py` writes such answers.
"""

import hashlib
import random

from rl.examples import Example
from rl.problems import Problems

DIGITS = 5
EOS = "$"


def _split_of(digits: tuple[int, ...]) -> str:
    """One prompt in ten is kept for validation; the digits alone decide, whatever the seed."""
    hashed = hashlib.sha256("".join(map(str, digits)).encode()).digest()
    return "val" if int.from_bytes(hashed[:8], "big") % 10 == 0 else "train"


class Sums:
    """Five-digit sums. The same (seed, split, index) is the same example on every machine."""

    def __init__(self, seed: int):
        self.seed = seed

    def example(self, split: str, index: int) -> Example:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        rng = random.Random(f"{self.seed}/{split}/{index}")
        while True:
            digits = tuple(rng.randrange(10) for _ in range(DIGITS))
            if _split_of(digits) == split:
                break
        return Example(
            prompt="+".join(map(str, digits)) + "=",
            answer=str(sum(digits) % 10),
            metadata={"digits": digits},
        )

    def problems(self) -> Problems:
        return Problems()

    def score(self, example: Example, text: str) -> float:
        """1.0 if the text closes with `#` and the right digit, else 0.0.

        A final EOS may be there or not. A second `#` scores nothing: it would be a second guess.
        """
        worked, _, result = text.removesuffix(EOS).partition("#")
        return float(bool(worked) and result == example.answer)
