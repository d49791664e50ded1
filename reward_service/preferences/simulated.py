"""Simulated people, who see a gold score and mostly follow it: for tests, for the quickstart, for experiments."""

import hashlib
from collections.abc import Sequence

import numpy as np

from configs.labels import SimulatedLabelerConfig
from protocol.records import text_of
from reward_service.functions import RewardFunction, import_function
from reward_service.preferences.labeling_protocol import (
    Clock,
    candidate_keys,
    every_candidate,
    grouped_by_score,
    make_label,
    outcome_of,
    scores_by_task,
)
from reward_service.preferences.records import Label, LabelerKind, Task, stable_id
from reward_service.scoring import RewardError


class SimulatedLabeler:
    """A person who is drawn by chance: Bradley-Terry for pairs, Plackett-Luce for rankings, on a gold score.

        u_i = sharpness gold_i + position_bias [i is shown first]
        order = descending u_i + Gumbel noise,  so that  P(a over b) = sigmoid(u_a - u_b)

    The Gumbel trick samples a Plackett-Luce ranking exactly, and for two candidates that is Bradley-Terry. A share
    `noise` of the labels is drawn without looking (for two: a coin flip), ties and position bias left out. In the
    others, candidates next to each other are tied where their gold scores differ by less than `tie_below`.

    All chance comes from a generator seeded with the run, the task and the labeler: neither the order of the tasks, nor
    how they are cut into calls, nor the order of the candidates in a task changes a label.

    Source: Plackett (1975); Yellott (1977) for the Gumbel form; simulated labels as in Gao et al. (arXiv 2210.10760).

    Args:
        config: Sharpness, noise, ties, position bias, and the dotted path of the gold score.
        run_seed: The run's seed; another seed is another person.
        score: The gold score itself, instead of the dotted path.

    Raises:
        UserError: If there is no function at the dotted path.
    """

    kind: LabelerKind = "simulated"

    def __init__(self, config: SimulatedLabelerConfig, *, run_seed: int, score: RewardFunction | None = None) -> None:
        self.labeler_id = f"simulated-{stable_id(config.model_dump_json(), run_seed)[:8]}"
        self._config = config
        self._run_seed = run_seed
        self._score = import_function(config.score, component=self.labeler_id) if score is None else score

    def label(self, tasks: Sequence[Task], *, now: Clock) -> list[Label]:
        """Judge tasks; the gold score is asked once for all candidates.

        Raises:
            RewardError: If the gold function raises, or returns anything but one finite number for each candidate.
        """
        if not tasks:
            return []
        gold = scores_by_task(self._gold(tasks), tasks, component=self.labeler_id)
        return [self._judge(task, scores, at=now()) for task, scores in zip(tasks, gold, strict=True)]

    def _gold(self, tasks: Sequence[Task]) -> object:
        shown = every_candidate(tasks)
        try:
            return self._score(
                prompts=[text_of(task.prompt) for task, _ in shown],
                responses=[candidate.text for _, candidate in shown],
                finish_reasons=[candidate.finish_reason or "stop" for _, candidate in shown],
                metadata=[dict(task.metadata) for task, _ in shown],
            )
        except Exception as error:
            # The function is somebody else's code: here is the border where its faults get the labeler's name.
            raise RewardError(
                f"the gold score raised {type(error).__name__}: {error} (on {len(shown)} responses from this one on)",
                component=self.labeler_id,
                key=candidate_keys(tasks)[0],
            ) from error

    def _judge(self, task: Task, gold: dict[str, float], *, at: float) -> Label:
        seed = hashlib.sha256(f"{self._run_seed}/{task.task_id}/{self.labeler_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(seed[:16], "big"))
        ids = sorted(gold)
        # Drawn in any case and in this order, so that two settings are compared on the same luck.
        presented = [ids[place] for place in rng.permutation(len(ids))]
        looks = rng.random() >= self._config.noise
        luck = dict(zip(ids, rng.gumbel(size=len(ids)).tolist(), strict=True))
        if looks:
            for name in ids:
                luck[name] += self._config.sharpness * gold[name]
            luck[presented[0]] += self._config.position_bias
        order = sorted(ids, key=lambda name: -luck[name])
        groups = grouped_by_score(order, scores=gold, tie_below=self._config.tie_below if looks else 0.0)
        outcome = outcome_of(groups, task=task)
        return make_label(task, by=self, presented=presented, outcome=outcome, shown_at=at, submitted_at=at)
