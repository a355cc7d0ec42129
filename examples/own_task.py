"""A task and a reward of your own: differences of two digits, judged by a function that gives marks in parts.

    .venv/bin/python examples/own_task.py differences.jsonl
    .venv/bin/northstar run k5 --set task.name=jsonl:differences.jsonl --set task.reward=examples/own_task.py:score --set run.steps=10

The first call writes the problems, one JSON object a line; any column may stand beside `prompt` and `answer`, and the reward
gets the whole row. The second trains on them. In the run's folder, `samples.jsonl` has the parts of every answer that is kept, and
`metrics.jsonl` their means: `critic/rewards/right/mean`, `critic/rewards/closed/mean`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def score(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> dict[str, float]:
    """A mark for the right digit behind `#`, and a tenth of one for writing a single `#` at all.

    `metadata` is the row, with `truncated`: whether the answer was cut at `grpo.max_response_length`.
    """
    closed = response.count("#") == 1 and not metadata["truncated"]
    said = response.partition("#")[2].removesuffix("$")
    return {"right": float(closed and said == answer), "closed": 0.1 * closed}


def write_problems(file: Path) -> int:
    """Every difference of two digits that is not negative, as `9+0+0+0+4=` for the built-in policy, which only adds."""
    rows = [
        {"prompt": f"{a}+0+0+0+{10 - b}=", "answer": str(a - b), "kind": "large" if a > 5 else "small"}
        for a in range(10)
        for b in range(1, a + 1)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the file to write, for example differences.jsonl")
    print(f"{write_problems(Path(sys.argv[1]))} problems in {sys.argv[1]}")
