"""One problem of a task: what the policy is shown and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rl.messages import Prompt, as_text


@dataclass(frozen=True)
class Example:
    """`metadata` is whatever the task's scorer needs."""

    prompt: Prompt
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def text(self) -> str:
        """The prompt as one text."""
        return as_text(self.prompt)
