"""The schedule: phases in order, unique keys, seeds that depend on the key alone."""

from dataclasses import replace

import numpy as np
import pytest

from cluster import schedule
from cluster.schedule import Phase, RunState
from configs.load import load
from protocol.messages import Prompt, RolloutKey


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.array([1, 2], dtype=np.int32), text=name)


def test_phases_follow_each_other_to_the_end() -> None:
    config = load("quickstart", ["rounds.iterations=2", "algorithm.critic_warmup_iterations=0"])
    state, seen = RunState(), []
    while state.phase is not Phase.DONE:
        seen.append((state.round, state.phase.value, state.policy_version))
        following = schedule.after(state, config)
        assert following.position > state.position
        state = following
    assert seen == [
        (1, "sft", 0),
        (1, "collect", 0),
        (1, "label", 0),
        (1, "refresh", 0),
        (1, "calibrate", 0),
        (1, "baseline", 0),
        (1, "optimise", 0),
        (1, "optimise", 1),
        (1, "evaluate", 2),
        (1, "rank", 2),
        (2, "collect", 2),
        (2, "label", 2),
        (2, "refresh", 2),
        (2, "calibrate", 2),
        (2, "optimise", 3),  # what the round starts from is a version of its own
        (2, "optimise", 4),
        (2, "evaluate", 5),
        (2, "rank", 5),
    ]
    assert (state.round, state.iteration, state.policy_version, state.last_version) == (2, 2, 5, 2)
    assert schedule.after(state, config) == state


def test_a_guard_ends_the_iterations_of_a_round() -> None:
    state = schedule.stopped(RunState(phase=Phase.OPTIMISE, iteration=3, policy_version=3), alarm="KL is too high")
    assert (state.phase, state.iteration, state.alarm) == (Phase.EVALUATE, 3, "KL is too high")
    config = load("quickstart", [])
    assert schedule.after(replace(state, phase=Phase.RANK), config).alarm is None


def test_names_of_policies() -> None:
    state = RunState(policy_version=41, last_version=20, best_version=12)
    named = {name: schedule.named_version(name, state) for name in ("sft", "current", "previous", "best", "v007")}
    assert named == {"sft": 0, "current": 20, "previous": 20, "best": 12, "v007": 7}


def test_temperatures_are_dealt_out_over_the_samples_of_a_prompt() -> None:
    config = load("quickstart", [])
    found = schedule.requests(
        [prompt("a"), prompt("b")], config, round=1, iteration=-3, samples=3, temperatures=(0.7, 1.2)
    )
    assert [request.temperature for request in found] == [0.7, 1.2, 0.7, 0.7, 1.2, 0.7]


def test_the_state_survives_json() -> None:
    state = RunState(phase=Phase.OPTIMISE, round=2, iteration=7, policy_version=47)
    assert RunState.from_json(state.to_json()) == state


def test_checkpoints_are_due_at_the_period_and_at_the_end() -> None:
    config = load("quickstart", ["rounds.iterations=5", "cluster.checkpoint_period_iterations=2"])
    state = RunState(phase=Phase.OPTIMISE)
    due = []
    while state.phase is Phase.OPTIMISE:
        state = schedule.after(state, config)
        due.append(schedule.checkpoint_is_due(state, config))
    assert due == [False, True, False, True, True]


def test_a_prompt_that_comes_twice_keeps_keys_unique() -> None:
    config = load("quickstart", ["rollout.samples_per_prompt=2"])
    requests = schedule.requests([prompt("a"), prompt("b"), prompt("a")], config, round=1, iteration=3)
    assert [(r.key.prompt_id, r.key.sample) for r in requests] == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
        ("b", 1),
        ("a", 2),
        ("a", 3),
    ]
    assert len({r.seed for r in requests}) == 6


def test_a_seed_depends_on_the_key_and_the_run_alone() -> None:
    key = RolloutKey(1, 2, "p", 0)
    assert key.seed(0) == RolloutKey(1, 2, "p", 0).seed(0)
    assert len({key.seed(0), key.seed(1), key._replace(sample=1).seed(0), key._replace(iteration=3).seed(0)}) == 4
    assert 0 <= key.seed(0) < 2**31


def test_groups_and_shares_cover_the_batch_once() -> None:
    keys = [RolloutKey(1, 0, str(i), 0) for i in range(10)]
    assert [len(group) for group in schedule.groups(keys, size=4)] == [4, 4, 2]
    dealt = schedule.shares(10, workers=3)
    assert sorted(i for share in dealt for i in share) == list(range(10))
    assert [len(share) for share in dealt] == [4, 3, 3]


@pytest.mark.parametrize(("num", "workers"), [(10, 3), (2, 5), (0, 1), (7, 1)])
def test_what_is_dealt_and_dealt_again_is_all_there_once(num: int, workers: int) -> None:
    prompts = [prompt(f"p{n}") for n in range(num)]
    requests = schedule.requests(prompts, load("quickstart", []), round=1, iteration=0, samples=1)
    first, *rest = schedule.dealt(requests, workers=workers)
    assert sorted(key for part in (first, *rest) for key in part) == sorted(request.key for request in requests)
    assert all(part[key].key == key for part in (first, *rest) for key in part)
    others = max(len(rest), 1)
    again = schedule.dealt(list(first.values()), workers=others)
    assert len(again) == others
    assert sorted(key for part in again for key in part) == sorted(first)
    assert max(map(len, again)) - min(map(len, again)) <= 1
