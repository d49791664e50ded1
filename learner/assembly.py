"""From what the pools return, group by group, to one scored batch."""

from collections.abc import Sequence
from itertools import pairwise

from protocol.messages import ReferenceLogprobs, RewardScores, Rollout, ScoredBatch, ScoredRollout

Group = tuple[Sequence[Rollout], RewardScores, ReferenceLogprobs]


def assemble(groups: Sequence[Group], *, round: int, iteration: int, policy_version: int) -> ScoredBatch:
    """Join rollouts with their scores and reference log-probs.

    Args:
        groups: Every rollout in one of them.
        round: Which round.
        iteration: Which iteration of it.
        policy_version: The version that the learner published last.

    Returns:
        The batch, in key order.

    Raises:
        ValueError: If the keys of a group do not match, or a key comes twice.
    """
    scored: list[ScoredRollout] = []
    for rollouts, rewards, reference in groups:
        keys = tuple(rollout.key for rollout in rollouts)
        if not keys == rewards.keys == reference.keys:
            raise ValueError(f"rollouts, scores and reference log-probs have different keys in the group of {keys[0]}")
        for place, rollout in enumerate(rollouts):
            scored.append(
                ScoredRollout(
                    rollout=rollout,
                    score=float(rewards.scores[place]),
                    components={name: float(values[place]) for name, values in rewards.components.items()},
                    ref_logprobs=reference.logprobs[place],
                )
            )
    # Sorted here, so that what is learned does not depend on how the groups were formed.
    scored.sort(key=lambda item: item.rollout.key)
    for first, second in pairwise(scored):
        if first.rollout.key == second.rollout.key:
            raise ValueError(f"rollout {first.rollout.key} comes twice in a batch")
    return ScoredBatch(round=round, iteration=iteration, policy_version=policy_version, rollouts=tuple(scored))
