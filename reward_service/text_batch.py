"""A group of responses as text, what reads it, and what is kept of it where a reward fails."""

import hashlib
import json
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from protocol import incidents
from protocol.files import write_text
from protocol.incidents import Incident
from protocol.messages import FinishReason, FloatArray, RolloutKey
from reward_service.scoring import RewardError


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """A group of responses as text, in the group's order."""

    keys: tuple[RolloutKey, ...]
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    metadata: tuple[Mapping[str, str], ...]
    policy_version: int | None = None
    """The version that wrote them; None where several did."""

    def arguments(self) -> dict[str, list[Any]]:
        """Return what a reward function is called with."""
        return {
            "prompts": list(self.prompts),
            "responses": list(self.responses),
            "finish_reasons": list(self.finish_reasons),
            "metadata": [dict(row) for row in self.metadata],
        }

    def part(self, start: int, stop: int) -> "TextBatch":
        """Return some of the responses that stand side by side."""
        return TextBatch(
            keys=self.keys[start:stop],
            prompts=self.prompts[start:stop],
            responses=self.responses[start:stop],
            finish_reasons=self.finish_reasons[start:stop],
            metadata=self.metadata[start:stop],
            policy_version=self.policy_version,
        )


class TextReward(Protocol):
    """A reward that reads text."""

    @property
    def name(self) -> str:
        """The component's name in the configuration."""
        ...

    def raw_scores(self, batch: TextBatch) -> FloatArray:
        """Return [B] raw scores, or raise a RewardError."""
        ...


@contextmanager
def batch_saved_on_failure(batch: TextBatch, *, incident_dir: Path) -> Iterator[None]:
    """Keep an incident and the batch when a reward fails on it, so that the failure can be replayed.

    Args:
        batch: What the reward was asked about.
        incident_dir: Where to.

    Raises:
        RewardError: The one that was raised inside, with the incident's file.
    """
    try:
        yield
    except RewardError as error:
        raise error.saved_at(str(_save(batch, error, incident_dir))) from error.__cause__


def file_name(component: str) -> str:
    """Turn a reward's name into a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", component)


def _save(batch: TextBatch, error: RewardError, incident_dir: Path) -> Path:
    # Named by content: the same failure after a retry writes the same files.
    digest = hashlib.sha256(" ".join(map(str, batch.keys)).encode()).hexdigest()[:12]
    name = f"reward-{file_name(error.component)}-{digest}"
    incident_dir.mkdir(parents=True, exist_ok=True)
    rows = (
        {"key": str(key), "prompt": prompt, "response": response, "finish_reason": reason, "metadata": dict(metadata)}
        for key, prompt, response, reason, metadata in zip(
            batch.keys, batch.prompts, batch.responses, batch.finish_reasons, batch.metadata, strict=True
        )
    )
    # Plain ASCII: a text may hold half a surrogate pair, which UTF-8 cannot say.
    write_text(incident_dir / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    cause = error.__cause__
    key = error.key or batch.keys[0]
    incident = Incident(
        kind="reward_failed",
        what=f"reward {error.component} failed on {key}: {error.what}",
        where=f"reward {error.component}",
        cause="" if cause is None else "".join(traceback.format_exception(cause)),
        action="no score is made up: the run stops, and the same command goes on from its last checkpoint",
        round=key.round,
        iteration=key.iteration,
        policy_version=batch.policy_version,
        data={"key": str(key), "batch": f"{name}.jsonl", "keys": [str(key) for key in batch.keys]},
    )
    return incidents.write(incident_dir, incident, name=name)
