"""The built-in task with turns: `sums`, where a `?` asks a calculator.

A turn of the policy that ends in `?` is answered with what the sum of the digits is up to there, mod 10, and the policy goes
on behind it: `1,6,5,8?` `7` `#7$`. The built-in policy writes a `?` in some of its answers, to look at the last step once
more by itself; with the calculator it can learn to ask.
"""

from __future__ import annotations

from typing import Any

from rl.examples import Example
from rl.messages import Message
from rl.sums_task import DIGITS, EOS, Sums

ASK = "?"


class Calculator(Sums):
    """The problems of `sums`."""

    def respond(self, messages: list[Message], metadata: dict[str, Any]) -> list[Message] | None:
        """The running sum of the step in which it is asked; None to a turn that asks nothing, or behind the last step."""
        said = "".join(message["content"] for message in messages[1:])
        step = said.count(",") + 1
        if not said.endswith(ASK) or "#" in said or step >= DIGITS:
            return None
        return [{"role": "tool", "content": str(sum(metadata["digits"][: step + 1]) % 10)}]

    def score(self, example: Example, text: str) -> float:
        """1.0 if the last turn closes with `#` and the right digit; the work may be in earlier ones."""
        _, closed, result = text.removesuffix(EOS).partition("#")
        return float(bool(closed) and result == example.answer)
