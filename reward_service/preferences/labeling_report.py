"""What a labeler's labels say about the labeler: verdicts, contradictions, position bias, failures."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reward_service.preferences.records import Label, LabelerKind

_DISAGREEMENT = re.compile(r"orders disagree in (\d+) of (\d+) \(([^)]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelingReport:
    """Counts over the labels of one kind of labeler."""

    kind: LabelerKind
    labels: int
    verdicts: Mapping[str, int]
    """Verdict -> labels; verdicts that never came are left out."""
    comparisons: int
    """Pairs that were judged; a ranking of K holds K (K - 1) / 2 of them. Invalid and skipped labels hold none."""
    flips: int
    """Of those, how many a judge answered differently when the order was swapped."""
    flip_rate: float | None
    """flips / comparisons; None for labelers that are not asked twice."""
    position_bias: float | None
    """From -1 (always the second) to 1 (always the first); 0 is fair. None where the order shown is not known to
    matter, or nothing was judged."""
    invalid_fraction: float
    invalid_reasons: Mapping[str, int]
    """What comes before the colon of each reason -> labels, most frequent first."""


def summarise_labels(labels: Sequence[Label]) -> LabelingReport:
    """Count what labels say.

    A judge is asked in both orders, so its bias is the surplus of answers for the first over those for the second:
        position_bias = (#A - #B) / (#A + #B + #TIE)
    People and simulated labelers see one order; theirs is taken over the pairs they did not skip:
        position_bias = (first wins - second wins) / judged pairs

    Args:
        labels: Labels of one kind, as made or as read from the store.

    Raises:
        ValueError: If there are none, or they are of several kinds: those do not belong in one table.
    """
    kinds = {label.labeler_kind for label in labels}
    if len(kinds) != 1:
        raise ValueError(f"a report is about labels of one kind, not {sorted(kinds)}")
    kind = labels[0].labeler_kind
    judged = [label for label in labels if label.outcome.verdict not in ("invalid", "skip")]
    invalid = [label.outcome.reason or "" for label in labels if label.outcome.verdict == "invalid"]
    comparisons = sum(num_comparisons(len(label.presented)) for label in judged)
    flips = [flip for label in judged for flip in flips_of(label)] if kind == "judge" else []
    return LabelingReport(
        kind=kind,
        labels=len(labels),
        verdicts=dict(Counter(label.outcome.verdict for label in labels)),
        comparisons=comparisons,
        flips=len(flips),
        flip_rate=len(flips) / comparisons if kind == "judge" and comparisons else None,
        position_bias=_judge_bias(flips, comparisons) if kind == "judge" else _one_order_bias(kind, judged),
        invalid_fraction=len(invalid) / len(labels),
        invalid_reasons=dict(Counter(reason.split(":")[0] for reason in invalid).most_common()),
    )


def num_comparisons(num_candidates: int) -> int:
    """Return how many pairs there are among candidates."""
    return num_candidates * (num_candidates - 1) // 2


def disagreement_note(flips: Sequence[tuple[str, str]], *, comparisons: int) -> str:
    """Write down how a judge contradicted itself, for the label's note.

    Args:
        flips: The two answers (A, B or TIE) of each pair on which the two orders disagree.
        comparisons: Pairs in the task.

    Returns:
        The note, empty without contradictions; `flips_of` reads it back.
    """
    if not flips:
        return ""
    return f"orders disagree in {len(flips)} of {comparisons} ({', '.join(' '.join(pair) for pair in flips)})"


def flips_of(label: Label) -> list[tuple[str, str]]:
    """Read back what `disagreement_note` wrote."""
    found = _DISAGREEMENT.search(label.note)
    if found is None:
        return []
    pairs = [pair.split(" ") for pair in found[3].split(", ")]
    return [(one, other) for one, other in pairs]


def _judge_bias(flips: Sequence[tuple[str, str]], comparisons: int) -> float | None:
    # Orders that agree say the first once and the second once, or TIE twice: only flips leave a surplus.
    surplus = sum((answer == "A") - (answer == "B") for pair in flips for answer in pair)
    return surplus / (2 * comparisons) if comparisons else None


def _one_order_bias(kind: LabelerKind, judged: Sequence[Label]) -> float | None:
    pairs = [label for label in judged if len(label.presented) == 2]
    if kind not in ("person", "simulated") or not pairs:
        return None
    winners = [(label.presented, label.outcome.winner) for label in pairs if label.outcome.winner is not None]
    return sum(1 if winner == presented[0] else -1 for presented, winner in winners) / len(pairs)
