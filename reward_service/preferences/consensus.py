"""What the labels of one task say together: a strict majority for a pair, mean ranks for a ranking."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reward_service.preferences.records import Label, LabeledTask, Verdict

Undecided = Literal["tie", "both bad", "skipped", "invalid", "no label", "no majority"]
_JUDGEMENTS: tuple[Verdict, ...] = ("preference", "tie", "both_bad")


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """An order of a task's candidates."""

    groups: tuple[tuple[str, ...], ...]
    """Candidate ids, best first, two groups at least; those in one group are tied."""
    strength: float | None
    """Of a pair: mean strength given by those who voted for the winner; None where nobody gave one."""

    def rank_of(self) -> dict[str, int]:
        """Return candidate id -> rank; 1 is best, and ties share a rank."""
        return {candidate: rank for rank, group in enumerate(self.groups, start=1) for candidate in group}


def consensus(labeled: LabeledTask) -> Consensus | Undecided:
    """Bring the standing labels of a task together.

    A pair has a winner if more than half of its judgements (preferences, ties, both bad) are for it. A ranking orders
    its candidates by their mean rank over the judgements, where tied candidates share the mean of their places.

    Returns:
        The order, or why there is none.
    """
    judgements = [label for label in labeled.labels if label.outcome.verdict in _JUDGEMENTS]
    if not judgements:
        return _why_unjudged(labeled.labels)
    verdicts = Counter(label.outcome.verdict for label in judgements)
    if 2 * verdicts["both_bad"] > len(judgements):
        return "both bad"
    if 2 * verdicts["tie"] > len(judgements):
        return "tie"
    ids = [candidate.candidate_id for candidate in labeled.task.candidates]
    return _majority(judgements, ids) if labeled.task.kind == "pair" else _mean_ranks(judgements, ids)


def _why_unjudged(labels: Sequence[Label]) -> Undecided:
    if not labels:
        return "no label"
    return "skipped" if any(label.outcome.verdict == "skip" for label in labels) else "invalid"


def _majority(judgements: Sequence[Label], ids: Sequence[str]) -> Consensus | Undecided:
    for winner, loser in (ids, ids[::-1]):
        votes = [label for label in judgements if label.outcome.winner == winner]
        if 2 * len(votes) > len(judgements):
            strengths = [label.outcome.strength for label in votes if label.outcome.strength is not None]
            strength = sum(strengths) / len(strengths) if strengths else None
            return Consensus(groups=((winner,), (loser,)), strength=strength)
    return "no majority"


def _mean_ranks(judgements: Sequence[Label], ids: Sequence[str]) -> Consensus | Undecided:
    # Twice the place keeps sums whole, so that equal means are exactly equal.
    sums = Counter(dict.fromkeys(ids, 0))
    for label in judgements:
        place = 0
        for group in label.outcome.ranking or (tuple(ids),):
            for candidate in group:
                sums[candidate] += 2 * place + len(group) + 1
            place += len(group)
    groups = tuple(
        tuple(candidate for candidate in ids if sums[candidate] == total) for total in sorted(set(sums.values()))
    )
    return Consensus(groups=groups, strength=None) if len(groups) > 1 else "tie"
