"""Which responses are compared, and what the report says about the rest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

from reward_service.preferences.records import Candidate, Task
from reward_service.preferences.selection import SelectionReport, form_tasks


def said(policy: str, *texts: str) -> list[Candidate]:
    return [
        Candidate(
            candidate_id=f"{policy}-{place}",
            text=text,
            policy=policy,
            policy_version=int(policy[1:]),
            sampling={"temperature": 0.7},
            token_ids=(1, 2),
        )
        for place, text in enumerate(texts)
    ]


def formed(
    given: Mapping[str, Sequence[Candidate]], num_tasks: int, **changes: Any
) -> tuple[list[Task], SelectionReport]:
    prompts = {name: f"prompt {name}" for name in given}
    fields: dict[str, Any] = {"round": 2, "purpose": "training", "seed": 5, **changes}
    return form_tasks(given, prompts=prompts, num_tasks=num_tasks, **fields)


def many(num_prompts: int, *policies: str, samples: int = 2) -> dict[str, list[Candidate]]:
    return {
        f"p{number}": [
            candidate
            for policy in policies
            for candidate in said(policy, *(f"{policy} {number} {sample}" for sample in range(samples)))
        ]
        for number in range(num_prompts)
    }


def met(tasks: Sequence[Task]) -> Counter[tuple[str, ...]]:
    """Count comparisons between policies, pair by pair."""
    return Counter(tuple(sorted((a.policy, b.policy))) for task in tasks for a, b in combinations(task.candidates, 2))


def test_one_policy_is_compared_with_itself() -> None:
    tasks, report = formed(many(10, "v003"), 6)
    assert len(tasks) == len({task.prompt_id for task in tasks}) == 6
    assert all(task.kind == "pair" and task.round == 2 and task.purpose == "training" for task in tasks)
    assert all(task.prompt == f"prompt {task.prompt_id}" for task in tasks)
    assert met(tasks) == {("v003", "v003"): 6}
    assert report == SelectionReport(
        asked=6,
        formed=6,
        num_responses=20,
        num_identical=0,
        num_empty=0,
        prompts_dropped={},
        num_repeated=0,
        comparisons={"v003 | v003": 6},
    )


def test_what_is_identical_empty_or_alone_is_dropped_and_counted() -> None:
    given = {
        "same": said("v001", "x", "x", "x"),
        "space": said("v001", "x", "x "),
        "empty": said("v001", "", " \n", "x"),
        "three": said("v001", "x", "y", "x"),
        "none": [],
    }
    tasks, report = formed(given, 5)
    assert sorted((task.prompt_id, sorted(c.text for c in task.candidates)) for task in tasks) == [
        ("space", ["x", "x "]),
        ("three", ["x", "y"]),
    ]
    assert (report.asked, report.formed, report.num_responses) == (5, 2, 11)
    assert (report.num_identical, report.num_empty) == (3, 2)
    assert report.prompts_dropped == {"fewer than 2 different responses": 3}
    assert str(report) == (
        "2 of 5 tasks from 11 responses; 3 identical responses left out; 2 empty responses left out; "
        "3 prompts cannot be used: fewer than 2 different responses"
    )


def test_several_policies_are_compared_with_each_other_and_never_where_they_agree() -> None:
    given = {
        "agree": said("v000", "x", "z") + said("v001", "x"),
        "alone": said("v000", "x", "y"),
        "echo": said("v000", "x") + said("v001", "x"),
    }
    tasks, report = formed(given, 9)
    assert [{(c.policy, c.text) for c in task.candidates} for task in tasks] == [{("v000", "z"), ("v001", "x")}]
    assert report.prompts_dropped == {"all responses are of one policy": 1, "fewer than 2 different responses": 1}


def test_every_pair_of_policies_gets_its_share() -> None:
    tasks, report = formed(many(90, "v000", "v001", "v002"), 90)
    assert met(tasks) == {("v000", "v001"): 30, ("v000", "v002"): 30, ("v001", "v002"): 30}
    assert report.comparisons == {"v000 | v001": 30, "v000 | v002": 30, "v001 | v002": 30}


def test_shares_stay_even_where_one_policy_answers_less_often() -> None:
    given = many(60, "v000", "v001", "v002")
    for number in range(30):
        given[f"p{number}"] = [one for one in given[f"p{number}"] if one.policy != "v002"]
    tasks, _ = formed(given, 60)
    counts = met(tasks)
    assert counts["v000", "v001"] >= 30
    assert counts["v000", "v002"] + counts["v001", "v002"] == 60 - counts["v000", "v001"]
    assert abs(counts["v000", "v002"] - counts["v001", "v002"]) <= 1


def test_what_the_ladder_knows_least_about_comes_most() -> None:
    variance = {frozenset({"v000", "v001"}): 1.0, frozenset({"v000", "v002"}): 2.0}
    tasks, _ = formed(many(100, "v000", "v001", "v002"), 100, pair_variance=variance)
    # The pair that is missing counts like the largest: shares 1 : 2 : 2.
    assert met(tasks) == {("v000", "v001"): 20, ("v000", "v002"): 40, ("v001", "v002"): 40}


def test_a_prompt_comes_again_only_where_prompts_are_too_few() -> None:
    given = many(3, "v000", samples=3)
    tasks, report = formed(given, 7)
    assert Counter(task.prompt_id for task in tasks).most_common()[0][1] == 3
    assert sorted(Counter(task.prompt_id for task in tasks).values()) == [2, 2, 3]
    assert report.num_repeated == 4
    texts = [frozenset(c.text for c in task.candidates) for task in tasks]
    assert len(set(texts)) == 7
    tasks, report = formed(given, 50)
    assert (len(tasks), report.formed, report.asked) == (9, 9, 50)


@pytest.mark.parametrize("size", [3, 4])
def test_rankings_mix_policies_evenly(size: int) -> None:
    tasks, _ = formed(many(40, "v000", "v001", samples=4), 40, responses_per_task=size)
    assert {task.kind for task in tasks} == {"ranking"}
    assert {len(task.candidates) for task in tasks} == {size}
    for task in tasks:
        counts = Counter(candidate.policy for candidate in task.candidates)
        assert max(counts.values()) - min(counts.values()) <= size % 2


def test_large_numbers_of_responses_are_sampled() -> None:
    tasks, report = formed(many(4, "v000", "v001", samples=12), 20, responses_per_task=9)
    assert (len(tasks), report.num_repeated) == (20, 16)
    assert all(len({candidate.text for candidate in task.candidates}) == 9 for task in tasks)


def test_ids_and_order_tell_nothing_about_who_wrote_what() -> None:
    tasks, _ = formed(many(400, "v000", "v001", samples=1), 400)
    firsts = [task.candidates[0].policy for task in tasks]
    assert 140 < firsts.count("v000") < 260  # 6 standard deviations of a fair coin
    ids = [candidate.candidate_id for task in tasks for candidate in task.candidates]
    assert len(set(ids)) == 800
    assert not any("v00" in one or "-" in one for one in ids)
    lower = [min(task.candidates, key=lambda one: one.candidate_id).policy for task in tasks]
    assert 140 < lower.count("v000") < 260
    assert tasks[0].candidates[0].token_ids == (1, 2)
    assert tasks[0].candidates[0].sampling == {"temperature": 0.7}


def test_the_result_is_a_function_of_the_seed() -> None:
    given = many(30, "v000", "v001")
    tasks, report = formed(given, 20)
    backwards = dict(reversed(list(given.items())))
    assert formed(backwards, 20) == (tasks, report)
    others = [formed(given, 20, seed=6)[0], formed(given, 20, round=3)[0], formed(given, 20, purpose="evaluation")[0]]
    for other in others:
        assert not {task.task_id for task in tasks} & {task.task_id for task in other}
        assert [task.prompt_id for task in other] != [task.prompt_id for task in tasks]


def test_nothing_asked_or_nothing_there_gives_nothing() -> None:
    assert formed(many(3, "v000"), 0)[0] == []
    tasks, report = formed({}, 5)
    assert tasks == []
    assert str(report) == "0 of 5 tasks from 0 responses"
