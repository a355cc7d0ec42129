"""One problem of a task: what the policy is shown and what a right answer is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """`prompt` is plain text, before any chat template; `metadata` is whatever the task's scorer needs."""

    prompt: str
    answer: str
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
