"""Attention checks: the known answer, blind and for everybody."""

from cluster.attention import attention_checks
from configs.data import SourceConfig
from configs.labels import PeopleConfig


def test_checks_expect_what_their_source_chose() -> None:
    source = SourceConfig(source="examples.quickstart.data:preferences", count=6)
    people = PeopleConfig(check_period=10, checks=source)
    tasks = list(attention_checks(people, round=2, seed=0))
    assert len(tasks) == 6
    assert len({task.task_id for task in tasks}) == 6
    for task in tasks:
        assert (task.purpose, task.kind, task.round) == ("check", "pair", 2)
        assert task.expected in {candidate.candidate_id for candidate in task.candidates}
        assert {candidate.policy for candidate in task.candidates} == {"check"}
    places = {[c.candidate_id for c in task.candidates].index(task.expected or "") for task in tasks}
    assert places == {0, 1}  # where the answer stands says nothing
    assert tasks == list(attention_checks(people, round=2, seed=0))


def test_without_a_period_there_are_none() -> None:
    source = SourceConfig(source="examples.quickstart.data:preferences", count=6)
    assert list(attention_checks(PeopleConfig(checks=source), round=1, seed=0)) == []
