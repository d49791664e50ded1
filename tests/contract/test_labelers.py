"""One suite for every labeler: what it says fits the task, comes in order, and is the same when asked again."""

import math
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from configs.labels import JudgeConfig, RewardModelLabelerConfig, SimulatedLabelerConfig
from reward_service.preferences.labelers import make_labeler
from reward_service.preferences.labeling_protocol import Labeler, label_chunks
from reward_service.preferences.labeling_report import summarise_labels
from reward_service.preferences.records import Task, label_from_json, label_to_json, stable_id
from tests.label_tasks import ReplyingCompleter, gold, score_texts, task

KINDS = ("simulated", "reward_model", "judge")
Make = Callable[..., Labeler]


def labeler_of(kind: str, *, seed: int = 0, name: str = "one") -> Labeler:
    """Make a labeler that follows the number at the end of a response."""
    if kind == "simulated":
        config = SimulatedLabelerConfig(score=f"module_{name}:gold", sharpness=1000.0, tie_below=0.1)
        return make_labeler(config, run_seed=seed, score=gold)
    if kind == "reward_model":
        config = RewardModelLabelerConfig(path=f"models/{name}", tie_below=0.1)
        return make_labeler(config, run_seed=seed, score_texts=score_texts)
    return make_labeler(JudgeConfig(model=name), run_seed=seed, complete=ReplyingCompleter())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def clock() -> Callable[[], float]:
    ticks: Iterator[int] = count(100)
    return lambda: float(next(ticks))


def tasks() -> list[Task]:
    return [
        task("up", "bad 1", "good 5"),
        task("down", "good 5", "bad 1"),
        task("even", "good 3", "fine 3"),
        task("three", "middling 2", "worst 1", "best 3"),
        task("four", "best 9", "level 4", "bad 1", "even 4"),
        task("alike", "a 7", "b 7", "c 7"),
        task("talk", "no 0", "yes 1", prompt=[{"role": "user", "content": "Hi"}]),
    ]


def test_what_it_says_is_right_and_in_the_order_of_the_tasks(kind: str) -> None:
    asked = tasks()
    labels = labeler_of(kind).label(asked, now=clock())
    assert [label.task_id for label in labels] == [one.task_id for one in asked]
    outcomes = [label.outcome for label in labels]
    assert [outcome.verdict for outcome in outcomes] == ["preference"] * 2 + ["tie"] + ["preference"] * 2 + [
        "tie",
        "preference",
    ]
    assert [outcome.winner for outcome in outcomes] == ["c1", "c0", None, None, None, None, "c1"]
    assert outcomes[3].ranking == (("c2",), ("c0",), ("c1",))
    best, middle, worst = outcomes[4].ranking
    assert (best, set(middle), worst) == (("c0",), {"c1", "c3"}, ("c2",))


def test_every_label_fits_its_task_and_survives_storage(kind: str) -> None:
    labeler, asked = labeler_of(kind), tasks()
    for one, label in zip(asked, labeler.label(asked, now=clock()), strict=True):
        label.check_against(one)
        assert label_from_json(label_to_json(label)) == label
        assert (label.labeler_id, label.labeler_kind) == (labeler.labeler_id, kind)
        assert label.label_id == stable_id(one.task_id, labeler.labeler_id)
        assert 100 <= label.shown_at <= label.submitted_at


def test_asked_again_in_another_order_and_other_chunks_it_says_the_same(kind: str) -> None:
    asked = tasks()
    once = {label.task_id: label for label in labeler_of(kind).label(asked, now=lambda: 0.0)}
    turned = list(reversed(asked))
    for chunk_tasks in (1, 3, 100):
        chunks = list(label_chunks(labeler_of(kind), turned, now=lambda: 0.0, chunk_tasks=chunk_tasks))
        assert len(chunks) == math.ceil(len(asked) / chunk_tasks)
        again = [label for chunk in chunks for label in chunk]
        assert [label.task_id for label in again] == [one.task_id for one in turned]
        assert {label.task_id: label for label in again} == once


def test_the_pseudonym_changes_with_what_the_judgement_depends_on(kind: str) -> None:
    assert labeler_of(kind).labeler_id == labeler_of(kind).labeler_id
    assert labeler_of(kind).labeler_id != labeler_of(kind, name="other").labeler_id
    assert (labeler_of(kind).labeler_id != labeler_of(kind, seed=1).labeler_id) == (kind == "simulated")


def test_no_tasks_make_no_labels(kind: str) -> None:
    assert labeler_of(kind).label([], now=clock()) == []
    assert list(label_chunks(labeler_of(kind), [], now=clock())) == []


def test_the_report_counts_verdicts(kind: str) -> None:
    report = summarise_labels(labeler_of(kind).label(tasks(), now=clock()))
    assert report.kind == kind
    assert report.verdicts == {"preference": 5, "tie": 2}
    assert report.comparisons == 4 + 3 + 6 + 3
    assert (report.invalid_fraction, report.invalid_reasons) == (0.0, {})
    assert report.flip_rate == (0.0 if kind == "judge" else None)
