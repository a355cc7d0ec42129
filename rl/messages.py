"""Messages of a chat: what they must look like, and what they are as one text. No torch."""

from __future__ import annotations

import json
from typing import Any, cast

Message = dict[str, str]  # role and content
Prompt = str | list[Message]  # plain text, before any chat template, or a chat of which the policy says what comes next
ROLES = ("system", "user", "assistant", "tool")


def as_text(prompt: Prompt) -> str:
    """One text for each prompt: a chat as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def checked_messages(value: Any) -> list[Message]:
    """As they are, without keys that are null. Raises ValueError with the first that is no message of a chat."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"holds {type(value).__name__} ({str(value)[:60]}), not a list of messages")
    found = list[Message]()
    for i, each in enumerate(cast(list[Any], value)):
        message = {key: part for key, part in each.items() if part is not None} if isinstance(each, dict) else {}
        if set(message) != {"role", "content"}:
            raise ValueError(f"message {i}: {str(each)[:60]!r} has not role and content, and nothing else")
        if message["role"] not in ROLES:
            raise ValueError(f"message {i}: the role {message['role']!r} is none of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {i}: its content is {type(message['content']).__name__}, not text")
        if message["role"] == "system" and i:
            raise ValueError(f"message {i} is the system's, which comes first or not at all")
        found.append(message)
    return found


def checked_chat(value: Any) -> list[Message]:
    """Messages that a policy can answer. Raises ValueError."""
    found = checked_messages(value)
    if found[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"ends with a message of the {found[-1]['role']}, and the policy answers a user or a tool")
    return found
