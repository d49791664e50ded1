"""Agreement: published examples, slow loops, and what counts as a judgement of what."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.preferences.agreement import (
    agreement_report,
    cohen_kappa,
    consensus_agreement,
    krippendorff_alpha,
    percent_agreement,
)
from reward_service.preferences.records import Candidate, Label, LabeledTask, Outcome, Purpose, Task, Verdict

# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: the data of his parts A, B and C; a dot is missing.
TWO_BINARY = ["0100000010", "1110010000"]
TWO_NOMINAL = ["aabbdcccedda", "babbbccceddd"]
FOUR = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def units_of(rows: Sequence[str]) -> list[list[str]]:
    return [[said for said in column if said != "."] for column in zip(*rows, strict=True)]


def numbers(units: list[list[str]]) -> list[list[int]]:
    return [[int(said) for said in unit] for unit in units]


def slow_alpha(units: Sequence[Sequence[int]], *, ordinal: bool) -> float:
    """By the definition: observed over expected disagreement, couple by couple."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]

    def distance(c: int, k: int) -> float:
        if not ordinal:
            return float(c != k)
        low, high = min(c, k), max(c, k)
        between = sum(low <= value <= high for value in values)
        return (between - (values.count(c) + values.count(k)) / 2) ** 2 if c != k else 0.0

    observed = 0.0
    for unit in units:
        for i, left in enumerate(unit):
            for j, right in enumerate(unit):
                if i != j:
                    observed += distance(left, right) / (len(unit) - 1)
    expected = 0.0
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            if i != j:
                expected += distance(left, right)
    return 1 - (observed / len(values)) / (expected / (len(values) * (len(values) - 1)))


def test_alpha_of_two_observers_and_two_values() -> None:
    assert krippendorff_alpha(units_of(TWO_BINARY), "nominal") == pytest.approx(0.095, abs=5e-4)


def test_alpha_of_two_observers_and_many_values() -> None:
    assert krippendorff_alpha(units_of(TWO_NOMINAL), "nominal") == pytest.approx(0.692, abs=5e-4)


def test_alpha_of_four_observers_with_missing_values() -> None:
    assert krippendorff_alpha(numbers(units_of(FOUR)), "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(numbers(units_of(FOUR)), "ordinal") == pytest.approx(0.815, abs=5e-4)


@given(st.lists(st.lists(st.integers(-2, 3), max_size=5), max_size=12), st.booleans())
def test_alpha_against_a_slow_loop(units: list[list[int]], ordinal: bool) -> None:
    level = "ordinal" if ordinal else "nominal"
    if len({value for unit in units if len(unit) > 1 for value in unit}) < 2:
        assert krippendorff_alpha(units, level) is None
    else:
        assert krippendorff_alpha(units, level) == pytest.approx(slow_alpha(units, ordinal=ordinal), abs=1e-9)


def test_alpha_of_full_agreement_is_one() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2, 2], [3]], "ordinal") == 1.0


def table(counts: list[list[int]]) -> list[tuple[int, int]]:
    return [(i, j) for i, row in enumerate(counts) for j, count in enumerate(row) for _ in range(count)]


def test_kappa_of_cohens_clinicians() -> None:
    # Cohen (1960), table 2: 200 diagnoses, p_o = .70, p_e = .41, kappa = .492.
    counts = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
    assert cohen_kappa(table(counts)) == pytest.approx(0.492, abs=5e-4)
    assert percent_agreement(table(counts)) == pytest.approx(0.70)


def test_kappa_at_the_ends() -> None:
    assert cohen_kappa(table([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert cohen_kappa(table([[5, 0], [0, 5]])) == 1.0
    assert cohen_kappa(table([[5, 5], [5, 5]])) == 0.0
    assert cohen_kappa(table([[0, 5], [5, 0]])) == -1.0
    assert cohen_kappa(table([[5, 0], [0, 0]])) is None, "chance explains everything"
    assert cohen_kappa([]) is None


def test_percent_agreement_counts_couples() -> None:
    assert percent_agreement([["a", "a", "b"], ["a", "a"], ["c"]]) == 2 / 4
    assert percent_agreement([["a"], []]) is None


def test_consensus_leaves_the_labeler_out() -> None:
    found = consensus_agreement([{"ann": "x", "bob": "x", "cid": "y"}, {"ann": "x"}])
    # For Ann, Bob and Cid disagree, so nothing leads; the same for Bob. Cid is alone against two.
    assert found == {"cid": (0, 1)}
    assert consensus_agreement([{"ann": "x", "bob": "x"}, {"ann": "x", "bob": "y"}]) == {"ann": (1, 2), "bob": (1, 2)}


def task(task_id: str, *, size: int = 2, purpose: Purpose = "training", expected: str | None = None) -> Task:
    return Task(
        task_id=task_id,
        round=1,
        kind="pair" if size == 2 else "ranking",
        purpose=purpose,
        prompt_id=task_id,
        prompt="?",
        candidates=tuple(
            Candidate(candidate_id=name, text=name, policy="v000", policy_version=0) for name in "abcdefghi"[:size]
        ),
        expected=expected,
    )


def label(labeled: Task, labeler: str, outcome: Outcome, *, seconds: float = 0.0, presented: str = "") -> Label:
    made = Label(
        label_id=f"{labeled.task_id} {labeler}",
        task_id=labeled.task_id,
        labeler_id=labeler,
        labeler_kind="person",
        presented=tuple(presented) or tuple(candidate.candidate_id for candidate in labeled.candidates),
        outcome=outcome,
        shown_at=100.0 if seconds else 0.0,
        submitted_at=100.0 + seconds if seconds else 0.0,
    )
    made.check_against(labeled)
    return made


def prefers(winner: str) -> Outcome:
    return Outcome(verdict="preference", winner=winner)


def says(verdict: Verdict) -> Outcome:
    return Outcome(verdict=verdict, reason="because" if verdict in ("skip", "invalid") else None)


def ranks(*groups: str) -> Outcome:
    return Outcome(verdict="preference", ranking=tuple(tuple(group) for group in groups))


def pair_task(task_id: str, **outcomes: Outcome) -> LabeledTask:
    made = task(task_id)
    return LabeledTask(task=made, labels=tuple(label(made, who, outcome) for who, outcome in outcomes.items()))


def test_a_report_over_pairs() -> None:
    tasks = [
        pair_task("1", ann=prefers("a"), bob=prefers("a"), cid=prefers("a")),
        pair_task("2", ann=prefers("b"), bob=prefers("b"), cid=prefers("a")),
        pair_task("3", ann=says("tie"), bob=says("both_bad"), cid=says("skip")),
        pair_task("4", ann=says("invalid")),
        pair_task("5", bob=prefers("b")),
    ]
    report = agreement_report(tasks)
    assert (report.num_tasks, report.num_shared) == (4, 3)
    assert report.percent == (3 + 1 + 0) / (3 + 3 + 1)
    # lower 1, tie or both bad 2, higher 3 for the ordinal scale; four names for the nominal one.
    assert report.alpha_nominal == pytest.approx(slow_alpha([[1, 1, 1], [3, 3, 1], [2, 4]], ordinal=False))
    assert report.alpha_ordinal == pytest.approx(slow_alpha([[1, 1, 1], [3, 3, 1], [2, 2]], ordinal=True))
    ann_bob, ann_cid, _ = report.pairs
    assert (ann_bob.first, ann_bob.second, ann_bob.num_units, ann_bob.percent) == ("ann", "bob", 3, 2 / 3)
    assert ann_bob.kappa == pytest.approx((2 / 3 - 2 / 9) / (1 - 2 / 9))
    assert (ann_cid.num_units, ann_cid.percent, ann_cid.kappa) == (2, 0.5, 0.0)
    ann, bob, cid = report.labelers
    assert (ann.num_judgements, ann.num_skips, ann.num_invalid) == (3, 0, 1)
    assert (bob.num_judgements, cid.num_judgements, cid.num_skips) == (4, 2, 1)
    assert (ann.consensus, ann.num_consensus) == (0.5, 2), "agrees on 1, nothing leads on 2, differs from Bob on 3"
    assert (cid.consensus, cid.num_consensus) == (0.5, 2)
    assert ann.median_s is None
    assert report.median_s is None


def test_the_side_on_which_something_was_shown_does_not_matter() -> None:
    made = task("1")
    labels = (label(made, "ann", prefers("b")), label(made, "bob", prefers("b"), presented="ba"))
    assert agreement_report([LabeledTask(task=made, labels=labels)]).percent == 1.0


def test_rankings_are_taken_apart_into_pairs() -> None:
    made = task("1", size=3)
    labels = (
        label(made, "ann", ranks("a", "b", "c")),
        label(made, "bob", ranks("ab", "c")),
        label(made, "cid", says("tie")),
    )
    report = agreement_report([LabeledTask(task=made, labels=labels)])
    assert (report.num_tasks, report.num_shared) == (1, 3)
    # ab: lower, tie, tie; ac: lower, lower, tie; bc: lower, lower, tie.
    assert report.percent == 3 / 9
    assert [(pair.first, pair.second, pair.percent) for pair in report.pairs] == [
        ("ann", "bob", 2 / 3),
        ("ann", "cid", 0.0),
        ("bob", "cid", 1 / 3),
    ]


def test_attention_checks_are_counted_and_left_out_of_agreement() -> None:
    check = task("check", purpose="check", expected="a")
    ranking = task("ranking", size=3, purpose="check", expected="c")
    tasks = [
        LabeledTask(task=check, labels=(label(check, "ann", prefers("a")), label(check, "bob", prefers("b")))),
        LabeledTask(task=ranking, labels=(label(ranking, "ann", ranks("c", "ab")), label(ranking, "bob", says("tie")))),
    ]
    report = agreement_report(tasks)
    assert (report.num_tasks, report.num_shared, report.percent, report.alpha_nominal) == (0, 0, None, None)
    assert [(who.checks_passed, who.num_checks, who.num_judgements) for who in report.labelers] == [
        (2, 2, 0),
        (0, 2, 0),
    ]


def test_the_median_time_leaves_out_labels_without_times() -> None:
    tasks: list[LabeledTask] = []
    for place, seconds in enumerate([10.0, 30.0, 500.0, 0.0]):
        made = task(str(place))
        tasks.append(LabeledTask(task=made, labels=(label(made, "ann", prefers("a"), seconds=seconds),)))
    report = agreement_report(tasks)
    assert report.median_s == 30.0
    assert report.labelers[0].median_s == 30.0


def test_no_labels_make_an_empty_report() -> None:
    report = agreement_report([])
    assert (report.num_tasks, report.percent, report.pairs, report.labelers) == (0, None, (), ())
