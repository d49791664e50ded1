"""How far labelers agree: with each other, beyond chance, and with what most of the others say. Pure functions."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Literal

from reward_service.preferences.records import Label, LabeledTask, LabelerKind, Outcome, Task

Category = Literal["lower", "tie", "both_bad", "higher"]
"""Of a pair, by candidate id: which of the two won. Ids say nothing about who wrote what, so neither do categories."""

Level = Literal["nominal", "ordinal"]

# On the ordinal scale two bad answers are as near to each other as two good ones.
_RANK: dict[Category, int] = {"lower": -1, "tie": 0, "both_bad": 0, "higher": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAgreement:
    """Two labelers, on what both judged."""

    first: str
    second: str
    num_units: int
    percent: float
    """Share on which they agree, 0 to 1."""
    kappa: float | None
    """Cohen's; None where both always say the same one thing, so that chance explains everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelerReport:
    """One labeler."""

    labeler_id: str
    labeler_kind: LabelerKind
    num_judgements: int
    """Tasks judged; skips and invalid labels left out."""
    num_skips: int
    num_invalid: int
    median_s: float | None
    """Seconds a task, from shown to submitted; None where no times were recorded."""
    consensus: float | None
    """Share of agreement with what most of the others say; None where there is no such thing."""
    num_consensus: int
    """On how many pairs."""
    checks_passed: int
    num_checks: int
    """Attention checks answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementReport:
    """All labelers."""

    num_tasks: int
    """Tasks with a judgement, attention checks left out."""
    num_shared: int
    """Pairs that at least two labelers judged; a ranking of K counts as K (K - 1) / 2 pairs."""
    percent: float | None
    """Share of agreeing couples of judgements of the same pair."""
    alpha_nominal: float | None
    """Krippendorff's, over lower, tie, both bad, higher; None where everybody always says the same one thing."""
    alpha_ordinal: float | None
    """Krippendorff's, over lower < tie or both bad < higher."""
    median_s: float | None
    pairs: tuple[PairAgreement, ...]
    labelers: tuple[LabelerReport, ...]


def percent_agreement(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Compute the share of agreeing couples among all couples of judgements of the same unit.

    Args:
        units: Each unit's judgements, of any number of labelers.

    Returns:
        0 to 1; None where no unit has two judgements.
    """
    couples = [left == right for unit in units for left, right in combinations(unit, 2)]
    return sum(couples) / len(couples) if couples else None


def cohen_kappa(judgements: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Compute the agreement of two labelers beyond chance.

        kappa = (p_o - p_e) / (1 - p_e),  p_e = sum_c p_1(c) p_2(c)

    Source: Cohen (1960).

    Args:
        judgements: What the two said about each unit that both judged.

    Returns:
        At most 1, 0 by chance; None where p_e = 1 or nothing was judged.
    """
    total = len(judgements)
    first, second = Counter(left for left, _ in judgements), Counter(right for _, right in judgements)
    # In whole numbers, so that p_e = 1 is seen exactly.
    expected = sum(first[category] * second[category] for category in first)
    if expected == total**2:
        return None
    observed = sum(left == right for left, right in judgements) * total
    return (observed - expected) / (total**2 - expected)


def krippendorff_alpha(units: Iterable[Sequence[int | str]], level: Level) -> float | None:
    """Compute the agreement of any number of labelers beyond chance, each unit judged by any of them.

        alpha = 1 - (n - 1) sum_ck o_ck d2(c, k) / sum_ck n_c n_k d2(c, k)

    with o_ck the coincidences (each unit's ordered couples over its judgements less one), n_c = sum_k o_ck, and
    d2 = [c != k] (nominal) or (sum_{g=c..k} n_g - (n_c + n_k) / 2)^2 (ordinal).

    Source: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability.

    Args:
        units: Each unit's judgements; those with fewer than two say nothing.
        level: `ordinal` takes the values' own order.

    Returns:
        At most 1, 0 by chance; None where fewer than two different values were given.
    """
    coincidences: defaultdict[tuple[int | str, int | str], float] = defaultdict(float)
    counts: Counter[int | str] = Counter()
    for unit in units:
        if len(unit) < 2:
            continue
        values = Counter(unit)
        counts.update(values)
        for c, num_c in values.items():
            for k, num_k in values.items():
                coincidences[c, k] += num_c * (num_k - (c == k)) / (len(unit) - 1)
    if len(counts) < 2:
        return None
    distance = _ordinal(counts) if level == "ordinal" else _nominal
    observed = sum(share * distance(c, k) for (c, k), share in coincidences.items())
    expected = sum(num_c * num_k * distance(c, k) for c, num_c in counts.items() for k, num_k in counts.items())
    return 1 - (counts.total() - 1) * observed / expected


def _nominal(left: int | str, right: int | str) -> float:
    return float(left != right)


def _ordinal(counts: Mapping[int | str, int]) -> Callable[[int | str, int | str], float]:
    order = sorted(counts, key=lambda value: (isinstance(value, str), value))
    below: dict[int | str, float] = {}
    total = 0
    for value in order:
        below[value] = total + counts[value] / 2  # the middle of the value's own judgements
        total += counts[value]
    return lambda left, right: (below[left] - below[right]) ** 2


def consensus_agreement(units: Iterable[Mapping[str, Hashable]]) -> dict[str, tuple[int, int]]:
    """Compare each labeler with what most of the others say.

    Args:
        units: Of each unit, labeler -> judgement.

    Returns:
        Labeler -> (agreements, units on which one judgement leads among the others).
    """
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for unit in units:
        for labeler, said in unit.items():
            others = Counter(other for who, other in unit.items() if who != labeler).most_common(2)
            leads = len(others) == 1 or (len(others) == 2 and others[0][1] > others[1][1])
            if leads:
                found[labeler].append(others[0][0] == said)
    return {labeler: (sum(hits), len(hits)) for labeler, hits in found.items()}


def agreement_report(tasks: Iterable[LabeledTask]) -> AgreementReport:
    """Summarise how labelers agree, how fast they are, and who differs from the others.

    Attention checks count as checks only. A ranking counts as its pairs.
    """
    tasks = list(tasks)
    judged = [task for task in tasks if task.task.purpose != "check"]
    units = [unit for task in judged for unit in _units(task)]
    nominal: list[list[Category]] = [list(unit.values()) for unit in units]
    labels = [(task.task, label) for task in tasks for label in task.labels]
    consensus = consensus_agreement(units)
    return AgreementReport(
        num_tasks=sum(any(_is_judgement(label) for label in task.labels) for task in judged),
        num_shared=sum(len(unit) >= 2 for unit in units),
        percent=percent_agreement(nominal),
        alpha_nominal=krippendorff_alpha(nominal, "nominal"),
        alpha_ordinal=krippendorff_alpha([[_RANK[said] for said in unit] for unit in nominal], "ordinal"),
        median_s=_median_s(label for _, label in labels),
        pairs=_pair_agreements(units),
        labelers=tuple(
            _labeler_report(labeler, [entry for entry in labels if entry[1].labeler_id == labeler], consensus)
            for labeler in sorted({label.labeler_id for _, label in labels})
        ),
    )


def _units(labeled: LabeledTask) -> list[dict[str, Category]]:
    """Return labeler -> category for each pair of candidates of a task, the lower candidate id first."""
    # A labeler's last judgement counts: labels stand oldest first.
    judgements = {label.labeler_id: label.outcome for label in labeled.labels if _is_judgement(label)}
    ids = sorted(candidate.candidate_id for candidate in labeled.task.candidates)
    return [
        {labeler: _category(outcome, low, high) for labeler, outcome in judgements.items()}
        for low, high in combinations(ids, 2)
    ]


def _category(outcome: Outcome, low: str, high: str) -> Category:
    if outcome.verdict == "both_bad":
        return "both_bad"
    if outcome.verdict == "tie":
        return "tie"
    if outcome.winner is not None:
        return "lower" if outcome.winner == low else "higher"
    place = {candidate: rank for rank, group in enumerate(outcome.ranking) for candidate in group}
    if place[low] == place[high]:
        return "tie"
    return "lower" if place[low] < place[high] else "higher"


def _is_judgement(label: Label) -> bool:
    return label.outcome.verdict in ("preference", "tie", "both_bad")


def _median_s(labels: Iterable[Label]) -> float | None:
    times = [
        label.submitted_at - label.shown_at
        for label in labels
        if _is_judgement(label) and 0 < label.shown_at <= label.submitted_at
    ]
    return median(times) if times else None


def _pair_agreements(units: Sequence[Mapping[str, Category]]) -> tuple[PairAgreement, ...]:
    said: defaultdict[tuple[str, str], list[tuple[Category, Category]]] = defaultdict(list)
    for unit in units:
        for first, second in combinations(sorted(unit), 2):
            said[first, second].append((unit[first], unit[second]))
    return tuple(
        PairAgreement(
            first=first,
            second=second,
            num_units=len(both),
            percent=sum(left == right for left, right in both) / len(both),
            kappa=cohen_kappa(both),
        )
        for (first, second), both in sorted(said.items())
    )


def _labeler_report(
    labeler: str, labels: Sequence[tuple[Task, Label]], consensus: Mapping[str, tuple[int, int]]
) -> LabelerReport:
    checks = [
        (task.expected, label.outcome)
        for task, label in labels
        if task.purpose == "check" and task.expected is not None and _is_judgement(label)
    ]
    work = [label for task, label in labels if task.purpose != "check"]
    agreed, num_consensus = consensus.get(labeler, (0, 0))
    return LabelerReport(
        labeler_id=labeler,
        labeler_kind=labels[0][1].labeler_kind,
        num_judgements=sum(_is_judgement(label) for label in work),
        num_skips=sum(label.outcome.verdict == "skip" for label in work),
        num_invalid=sum(label.outcome.verdict == "invalid" for label in work),
        median_s=_median_s(label for _, label in labels),
        consensus=agreed / num_consensus if num_consensus else None,
        num_consensus=num_consensus,
        checks_passed=sum(_passes(expected, outcome) for expected, outcome in checks),
        num_checks=len(checks),
    )


def _passes(expected: str, outcome: Outcome) -> bool:
    return outcome.winner == expected or (bool(outcome.ranking) and outcome.ranking[0] == (expected,))
