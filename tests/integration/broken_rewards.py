"""Reward functions that fail, as a user's might."""

import math


def raises(*, prompts: list[str], responses: list[str], **_: object) -> list[float]:
    """Fail on every batch."""
    raise KeyError("no such column")


def returns_nan(*, prompts: list[str], responses: list[str], **_: object) -> list[float]:
    """Return a number that is none for the last response."""
    return [*([0.0] * (len(responses) - 1)), math.nan]
