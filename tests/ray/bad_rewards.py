"""Reward functions that a run is to survive, or to end by."""

import os


def crashes(prompt: str, response: str, answer: str, metadata: dict) -> float:
    os._exit(9)
