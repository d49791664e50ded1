"""The types on the wire, in the order in which they come to be.

    Prompt -> Rollout -> ScoredRollout -> ScoredBatch -> UpdateReport -> IterationReport -> RoundReport

A later stage is a new type that contains the earlier one; no field is filled in afterwards. Arrays are numpy; torch
begins inside the workers.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.records import Text

FinishReason = Literal["stop", "length"]
IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, ready for the engine."""

    prompt_id: str
    """Unique within its data set, and stable from run to run."""
    token_ids: IntArray
    """[P] token ids, chat template applied."""
    text: str
    """What the user wrote (the last user turn of a conversation), for reward functions and for people."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further columns of the data set."""
    source: Text = ""
    """The prompt as it came, plain text or messages: what labelers read."""


class RolloutKey(NamedTuple):
    """The identity of one response. Results are idempotent by key; keys sort in the order of the batch."""

    round: int
    iteration: int
    prompt_id: str
    sample: int

    def seed(self, run_seed: int) -> int:
        """Derive the sampling seed of this response.

        It depends on the key and the run alone, so the tokens do not depend on which worker sampled them.
        """
        text = f"{run_seed}/{self.round}/{self.iteration}/{self.prompt_id}/{self.sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFF_FFFF

    def __str__(self) -> str:
        return f"r{self.round}/i{self.iteration}/{self.prompt_id}#{self.sample}"


class PolicyVersions(NamedTuple):
    """The policy versions that sampled a response's first and last token."""

    first: int
    last: int


NOT_SAMPLED = PolicyVersions(-2, -2)
"""In place of the versions of a response that was read from data: no policy of the run sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One response to be sampled."""

    key: RolloutKey
    prompt: Prompt
    seed: int
    max_response_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response, with everything the engine knew when it sampled it; or one that was read from data."""

    key: RolloutKey
    prompt: Prompt
    response_ids: IntArray
    """[T] sampled token ids, with EOS when it was sampled. Never re-tokenised."""
    behavior_logprobs: FloatArray | None
    """[T] log-probs of the sampled tokens under the distribution that was really sampled; None where nobody recorded
    any, because the response was read from data."""
    finish_reason: FinishReason
    policy_versions: PolicyVersions
    worker: str
    """Which rollout worker sampled it, or which data it is from (for people; nothing depends on it)."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens."""
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutMeta:
    """What the driver sees of a rollout."""

    key: RolloutKey
    prompt_tokens: int
    response_tokens: int
    finish_reason: FinishReason
    policy_versions: PolicyVersions
    repeated_fraction: float
    """Share of the response's 3-grams that it has said before."""

    @classmethod
    def of(cls, rollout: Rollout) -> "RolloutMeta":
        """Describe a rollout without its arrays."""
        return cls(
            key=rollout.key,
            prompt_tokens=len(rollout.prompt.token_ids),
            response_tokens=len(rollout.response_ids),
            finish_reason=rollout.finish_reason,
            policy_versions=rollout.policy_versions,
            repeated_fraction=repeated_fraction(rollout.response_ids),
        )


def repeated_fraction(token_ids: IntArray, *, n: int = 3) -> float:
    """Compute the share of n-grams that occurred earlier in the same sequence: 1 - different / all.

    Args:
        token_ids: [T] tokens.
        n: Tokens of a gram.

    Returns:
        0 for sequences shorter than n.
    """
    num = len(token_ids) - n + 1
    if num <= 0:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(token_ids, n)
    return 1.0 - len(np.unique(grams, axis=0)) / num


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScores:
    """What one scoring worker says about a group of rollouts, in the group's order."""

    keys: tuple[RolloutKey, ...]
    scores: FloatArray
    """[B] the combined score, after calibration, combination, truncation rule, clip and scale."""
    components: Mapping[str, FloatArray]
    """Component name -> [B] normalised score before combination."""
    gold: Mapping[str, FloatArray]
    """`gold` and its components -> [B], for the driver; always empty in what the learner is given."""
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLogprobs:
    """The frozen reference's log-probs for a group of rollouts, in the group's order."""

    keys: tuple[RolloutKey, ...]
    logprobs: tuple[FloatArray, ...]
    """For each rollout [T], under the frozen reference at the sampling temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSummary:
    """What the driver may know of a group's reference log-probs."""

    keys: tuple[RolloutKey, ...]
    behavior_kl_nats: Mapping[RolloutKey, float]
    """Sum over the response of behaviour log-prob minus reference log-prob: the k1 estimate of each sequence. Responses
    that were read from data have none."""
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its score and the reference's opinion of it."""

    rollout: Rollout
    score: float
    components: Mapping[str, float]
    ref_logprobs: FloatArray
    """[T] log-probs of the response tokens under the frozen reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """All scored rollouts of one iteration, in key order."""

    round: int
    iteration: int
    policy_version: int
    rollouts: tuple[ScoredRollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one iteration of learning did, over all ranks."""

    metrics: Mapping[str, float]
    """By the names in protocol.metrics."""
    num_steps: int
    num_skipped_steps: int
    kl_nats_per_sequence: Mapping[RolloutKey, float]
    """The k1 estimate of each response, summed over its tokens, under the policy before the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationReport:
    """One iteration, as it is logged: one flat line in metrics.jsonl."""

    round: int
    iteration: int
    policy_version: int
    metrics: Mapping[str, float]
    samples: tuple["SampleText", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleText:
    """A decoded response for people to read."""

    key: RolloutKey
    prompt: str
    response: str
    score: float
    kl_nats: float
    reward: float
    """score - beta * KL: what the response was worth to the optimiser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One round, as it is kept in rounds/rNNN/round.json."""

    round: int
    policy_version: int
    """What it ended with."""
    reward_version: int | None
    """The reward model that scored; None where no reward model is trained."""
    best_version: int
    iterations: int
    alarm: str | None
    """Why a guard stopped it early."""
    score_start: float
    score_end: float

    def to_json(self) -> dict[str, Any]:
        """Write the report as plain JSON values."""
        return asdict(self)
