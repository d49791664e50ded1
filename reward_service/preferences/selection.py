"""Which responses are compared: pure, and a function of its arguments alone.

Where several policies wrote, they are compared with each other, and every pair of policies gets its share of the
comparisons; a single policy is compared with itself. A pair of which the ladder knows little gets more: its share is
proportional to the variance of the difference of their ratings.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean

from protocol.records import Text
from reward_service.preferences.records import Candidate, Purpose, Task, stable_id

PolicyPair = frozenset[str]
"""Two policies; one name alone where a policy is compared with itself."""

_MAX_SETS = 256
"""Of more sets of responses to one prompt, so many are drawn at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionReport:
    """What became of the responses."""

    asked: int
    """Tasks asked for."""
    formed: int
    num_responses: int
    num_identical: int
    """Responses left out because their policy has said the same to the prompt, letter by letter."""
    num_empty: int
    """Responses left out because they say nothing."""
    prompts_dropped: Mapping[str, int]
    """Why a prompt can give no task -> how many cannot."""
    num_repeated: int
    """Tasks beyond the first of their prompt."""
    comparisons: Mapping[str, int] = field(default_factory=dict[str, int])
    """`policy | policy` -> comparisons between the two; a ranking has one for every two of its candidates."""

    def __str__(self) -> str:
        parts = [f"{self.formed} of {self.asked} tasks from {self.num_responses} responses"]
        if self.num_identical:
            parts.append(f"{self.num_identical} identical responses left out")
        if self.num_empty:
            parts.append(f"{self.num_empty} empty responses left out")
        parts += [f"{count} prompts cannot be used: {reason}" for reason, count in self.prompts_dropped.items()]
        if self.num_repeated:
            parts.append(f"{self.num_repeated} tasks on a prompt that has one already")
        if len(self.comparisons) > 1:
            parts += [f"{count} times {pair}" for pair, count in self.comparisons.items()]
        return "; ".join(parts)


def form_tasks(
    candidates_by_prompt: Mapping[str, Sequence[Candidate]],
    *,
    prompts: Mapping[str, Text],
    num_tasks: int,
    responses_per_task: int = 2,
    round: int,
    purpose: Purpose,
    seed: int,
    pair_variance: Mapping[PolicyPair, float] | None = None,
) -> tuple[list[Task], SelectionReport]:
    """Form tasks of the responses to each prompt.

    A prompt gives one task, and more only where there are fewer usable prompts than tasks asked for; no set of
    responses comes twice.

    Args:
        candidates_by_prompt: Prompt id -> responses. Their candidate ids are replaced by blind ones.
        prompts: Prompt id -> prompt.
        num_tasks: How many.
        responses_per_task: 2 for pairs, more for rankings.
        round: Of the tasks.
        purpose: Of the tasks.
        seed: Decides which prompts and responses are taken, and in which order candidates stand.
        pair_variance: Pair of policies -> variance of the difference of their ratings; a pair that is missing counts
            like the largest. None gives all pairs the same share.

    Returns:
        The tasks, and what was left out. There may be fewer tasks than asked for: `report.formed` says so.
    """
    usable = {name: _distinct(given) for name, given in sorted(candidates_by_prompt.items())}
    policies = {candidate.policy for given in usable.values() for candidate in given}
    generator = random.Random(stable_id("selection", seed, round, purpose))
    sets = {name: _sets(given, responses_per_task, policies, generator) for name, given in usable.items()}
    order = [name for name, found in sets.items() if found]
    generator.shuffle(order)
    counts: Counter[PolicyPair] = Counter()
    tasks: list[Task] = []
    while len(tasks) < num_tasks and any(sets.values()):
        for name in [name for name in order if sets[name]][: num_tasks - len(tasks)]:
            chosen = min(sets[name], key=lambda members: _cost(members, counts, pair_variance or {}))
            sets[name].remove(chosen)
            counts.update(_policy_pairs(chosen))
            task_id = stable_id("task", seed, round, purpose, name, len(tasks))
            tasks.append(
                Task(
                    task_id=task_id,
                    round=round,
                    kind="pair" if responses_per_task == 2 else "ranking",
                    purpose=purpose,
                    prompt_id=name,
                    prompt=prompts[name],
                    candidates=_blind(task_id, chosen, generator),
                )
            )
    return tasks, _report(num_tasks, tasks, candidates_by_prompt, responses_per_task, counts)


def _distinct(given: Sequence[Candidate]) -> list[Candidate]:
    """Leave out what is empty, and what the same policy has said before."""
    first: dict[tuple[str, str], Candidate] = {}
    for candidate in given:
        if candidate.text.strip():
            first.setdefault((candidate.policy, candidate.text), candidate)
    return list(first.values())


def _sets(
    given: Sequence[Candidate], size: int, policies: set[str], generator: random.Random
) -> list[tuple[Candidate, ...]]:
    """List the sets of responses that make a task, in random order: all different, and not all of one policy."""
    if math.comb(len(given), size) <= _MAX_SETS:
        found = list(combinations(given, size))
    else:
        drawn = {tuple(sorted(generator.sample(range(len(given)), size))) for _ in range(_MAX_SETS)}
        found = [tuple(given[place] for place in places) for places in sorted(drawn)]
    found = [members for members in found if _makes_task(members, policies)]
    generator.shuffle(found)
    return found


def _makes_task(members: Sequence[Candidate], policies: set[str]) -> bool:
    if len({candidate.text for candidate in members}) < len(members):
        return False
    return len(policies) == 1 or len({candidate.policy for candidate in members}) > 1


def _policy_pairs(members: Sequence[Candidate]) -> list[PolicyPair]:
    return [frozenset((a.policy, b.policy)) for a, b in combinations(members, 2)]


def _cost(
    members: Sequence[Candidate], counts: Mapping[PolicyPair, int], variance: Mapping[PolicyPair, float]
) -> tuple[int, float]:
    """Say how little a set is wanted: comparisons of a policy with itself, then (count + 1) / share of its pairs."""
    pairs = _policy_pairs(members)
    largest = max(variance.values(), default=1.0)
    # A pair of which all is known is still better than none.
    shares = [max(variance.get(pair, largest), 1e-9) for pair in pairs]
    within = sum(len(pair) == 1 for pair in pairs)
    return within, fmean((counts.get(pair, 0) + 1) / share for pair, share in zip(pairs, shares, strict=True))


def _blind(task_id: str, members: Sequence[Candidate], generator: random.Random) -> tuple[Candidate, ...]:
    """Bring candidates into a random order, and give them ids that tell nothing."""
    mixed = list(members)
    generator.shuffle(mixed)
    return tuple(
        replace(candidate, candidate_id=stable_id(task_id, place)[:12]) for place, candidate in enumerate(mixed)
    )


def _report(
    asked: int,
    tasks: Sequence[Task],
    candidates_by_prompt: Mapping[str, Sequence[Candidate]],
    size: int,
    counts: Mapping[PolicyPair, int],
) -> SelectionReport:
    everything = [candidate for given in candidates_by_prompt.values() for candidate in given]
    policies = {candidate.policy for candidate in everything if candidate.text.strip()}
    reasons = (_why_unusable(_distinct(given), size, policies) for given in candidates_by_prompt.values())
    num_empty = sum(not candidate.text.strip() for candidate in everything)
    num_distinct = sum(len(_distinct(given)) for given in candidates_by_prompt.values())
    named = {" | ".join(sorted(pair) * (3 - len(pair))): count for pair, count in counts.items()}
    return SelectionReport(
        asked=asked,
        formed=len(tasks),
        num_responses=len(everything),
        num_identical=len(everything) - num_empty - num_distinct,
        num_empty=num_empty,
        prompts_dropped=dict(sorted(Counter(reason for reason in reasons if reason is not None).items())),
        num_repeated=len(tasks) - len({task.prompt_id for task in tasks}),
        comparisons=dict(sorted(named.items())),
    )


def _why_unusable(given: Sequence[Candidate], size: int, policies: set[str]) -> str | None:
    texts = {candidate.text for candidate in given}
    if len(texts) < size:
        return f"fewer than {size} different responses"
    if len(policies) > 1 and len({candidate.policy for candidate in given}) == 1:
        return "all responses are of one policy"
    return None
