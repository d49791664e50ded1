"""A batch to ask a reward endpoint about, and what an honest one would answer."""

from typing import Any

from protocol.messages import RolloutKey
from reward_service.text_batch import TextBatch
from tests.json_server import Reply


def batch(size: int = 3) -> TextBatch:
    """Make a batch whose n-th response has n letters."""
    names = [chr(ord("a") + place) for place in range(size)]
    return TextBatch(
        keys=tuple(RolloutKey(2, 7, name, 0) for name in names),
        prompts=tuple(f"{name}?" for name in names),
        responses=tuple("xyz"[place % 3] * (place + 1) for place in range(size)),
        finish_reasons=tuple("length" if place == 1 else "stop" for place in range(size)),
        metadata=tuple({"tag": str(place + 1)} for place in range(size)),
        policy_version=31,
    )


def lengths(number: int, body: dict[str, Any]) -> Reply:
    """Score each response by its length."""
    return Reply({"scores": [len(response) for response in body["responses"]]})
