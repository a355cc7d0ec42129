"""One problem of a task: what the policy is shown and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """`prompt` is plain text, before any chat template; `metadata` is whatever the task's scorer needs."""

    prompt: str
    answer: str
    metadata: dict = field(default_factory=dict)
