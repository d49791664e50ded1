"""Which of a prompt's responses are learned from: the best, or the best against the worst. Pure functions of a batch.

Scores are compared within a prompt of one batch alone, so always by one reward model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol.messages import ScoredBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of a batch, and the prompts that make none. Each prompt is in exactly one of the three."""

    chosen: tuple[int, ...]
    """The place in the batch of each pair's better response."""
    rejected: tuple[int, ...]
    """Of the worse one."""
    num_tied: int
    """Prompts whose different responses all have the same score."""
    num_identical: int
    """Prompts to which all responses are the same."""

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Each pair: the better response, then the worse."""
        return tuple(zip(self.chosen, self.rejected, strict=True))


def ranked(batch: ScoredBatch, *, run_seed: int) -> list[list[int]]:
    """Order each prompt's different responses from best to worst by score.

    Identical responses count once, as the one with the lowest key. Between equal scores the lot decides, uniformly; it
    is derived from the run's seed, round, iteration and prompt, so no other prompt has a say in it.

    Source: Llama 2 (2023), section 3.2.3, for the choice; algorithms.md 14 for ties and duplicates.

    Args:
        batch: In key order, with finite scores.
        run_seed: Of the run.

    Returns:
        For each prompt, in the order of the batch, its responses' places in the batch.
    """
    by_prompt: dict[str, dict[bytes, int]] = {}
    for place, scored in enumerate(batch.rollouts):
        different = by_prompt.setdefault(scored.rollout.key.prompt_id, {})
        different.setdefault(scored.rollout.response_ids.tobytes(), place)
    found: list[list[int]] = []
    for prompt_id, different in by_prompt.items():
        places = list(different.values())
        named = f"{run_seed}/best of n/{batch.round}/{batch.iteration}/{prompt_id}"
        lot = np.random.default_rng(list(hashlib.sha256(named.encode()).digest())).permutation(len(places))
        order = np.lexsort((lot, np.array([-batch.rollouts[place].score for place in places])))
        found.append([places[i] for i in order])
    return found


def best_against_worst(batch: ScoredBatch, ranking: Sequence[Sequence[int]]) -> Pairs:
    """Make one pair of each prompt whose responses differ in score.

    Args:
        batch: The batch.
        ranking: Its responses, as `ranked` orders them.

    Returns:
        The pairs, in the order of the prompts.
    """
    different = [places for places in ranking if len(places) > 1]
    pairs = [
        (places[0], places[-1])
        for places in different
        if batch.rollouts[places[0]].score > batch.rollouts[places[-1]].score
    ]
    return Pairs(
        chosen=tuple(best for best, _ in pairs),
        rejected=tuple(worst for _, worst in pairs),
        num_tied=len(different) - len(pairs),
        num_identical=len(ranking) - len(different),
    )


def num_tied_for_best(batch: ScoredBatch, ranking: Sequence[Sequence[int]]) -> int:
    """Count the prompts where the lot, and not the score, has decided which response is the best."""
    return sum(
        len(places) > 1 and batch.rollouts[places[0]].score == batch.rollouts[places[1]].score for places in ranking
    )
