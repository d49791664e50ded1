"""A reward model as labeler: the response with the higher score wins."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from configs.labels import RewardModelLabelerConfig
from protocol.records import Text
from reward_service.preferences.labeling_protocol import (
    Clock,
    every_candidate,
    grouped_by_score,
    make_label,
    outcome_of,
    scores_by_task,
)
from reward_service.preferences.records import Label, LabelerKind, Task, stable_id


class ScoreTexts(Protocol):
    """Asks a reward model."""

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> ArrayLike:
        """Return [N] scores of N responses, each to the prompt in the same place; conversations come as they are."""
        ...


class RewardModelLabeler:
    """A labeler that has no doubts and no luck.

        a over b  iff  s_a - s_b > 0  and  s_a - s_b >= tie_below

    Equal scores are a tie whatever `tie_below` is. A ranking is the order of the scores, in groups that start at the
    best one not yet in a group and take in whatever is closer to it than `tie_below`.

    Args:
        config: The model's path, which names the labeler, and the width of a tie.
        score_texts: Asks that model.
    """

    kind: LabelerKind = "reward_model"

    def __init__(self, config: RewardModelLabelerConfig, *, score_texts: ScoreTexts) -> None:
        self.labeler_id = f"reward-model-{stable_id(config.path, config.tie_below)[:8]}"
        # The smallest positive number makes ties of equal scores, and of nothing else.
        self._tie_below = max(config.tie_below, float(np.nextafter(0, 1)))
        self._score_texts = score_texts

    def label(self, tasks: Sequence[Task], *, now: Clock) -> list[Label]:
        """Judge tasks; all candidates are scored in one call.

        Raises:
            RewardError: If the model does not return one finite number for each candidate. What the call itself raises
                goes through as it is: a failed score is a failure, never a tie.
        """
        if not tasks:
            return []
        shown_at = now()
        shown = every_candidate(tasks)
        raw = self._score_texts([task.prompt for task, _ in shown], [candidate.text for _, candidate in shown])
        scores = scores_by_task(raw, tasks, component=self.labeler_id)
        submitted_at = now()
        return [
            make_label(
                task,
                by=self,
                # It reads one response at a time; no order was shown.
                presented=list(found),
                outcome=outcome_of(self._groups(found), task=task),
                shown_at=shown_at,
                submitted_at=submitted_at,
            )
            for task, found in zip(tasks, scores, strict=True)
        ]

    def _groups(self, scores: dict[str, float]) -> list[list[str]]:
        order = sorted(scores, key=lambda name: -scores[name])
        return grouped_by_score(order, scores=scores, tie_below=self._tie_below)
