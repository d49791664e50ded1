"""The ladder of a run: which comparisons place a new policy, and whether it becomes the best."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cluster import samples, schedule
from cluster.collection import Collection
from cluster.evaluation import Evaluation
from cluster.run_directory import RunDirectory
from cluster.schedule import RunState
from configs.labels import LabelerConfig, PeopleConfig
from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from protocol.files import write_json
from protocol.messages import Rollout
from reward_service import ladder
from reward_service.ladder import Comparison, LadderError
from reward_service.preferences.records import Candidate, Label, LabeledTask, Task, stable_id
from reward_service.preferences.store import PreferenceStore

_LOG = logging.getLogger(__name__)


class Ranking:
    """Compares the versions of a run with each other.

    Args:
        config: The run's configuration.
        directory: Of the run.
        store: Where tasks and labels are kept.
        collection: Has tasks labelled.
        evaluated: Scores a version's responses to the held-out prompts with the reward models of now.
        decode: Turns token ids into text.
        say: Takes lines for people.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        store: PreferenceStore,
        collection: Collection,
        evaluated: Callable[[int], Evaluation],
        decode: Callable[[Sequence[int]], str],
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._store = store
        self._collection = collection
        self._evaluated = evaluated
        self._decode = decode
        self._say = say

    def rank(self, state: RunState) -> int:
        """Compare this round's policy with its opponents, fit the ladder, and decide which policy is the best.

        Args:
            state: Where the run stands; `policy_version` is the round's policy.

        Returns:
            The best version.
        """
        version = state.policy_version
        opponents = self._opponents(state)
        labeler = self._labeler(state)
        if labeler is None:
            new = [c for other in opponents for c in self._scored(version, other)]
        else:
            overlap = labeler.overlap if isinstance(labeler, PeopleConfig) else 1
            self._ask(state, version, opponents, overlap=overlap)
            self._collection.label(labeler, round=state.round, purpose="evaluation")
            new = self._labelled(state.round) + self._ties(state.round, version, opponents, weight=float(overlap))
        self._keep(state.round, new)
        comparisons = [c for number in range(1, state.round + 1) for c in self._kept(number)]
        try:
            found = self._fitted(comparisons)
        except LadderError as error:  # too few labels for a rating are no reason to lose the round
            _LOG.warning(
                "round %d: %s cannot be rated, %s stays the best: %s",
                state.round,
                _name(version),
                _name(state.best_version),
                error,
            )
            return state.best_version
        best = self._promoted(state, found)
        drift = self._drift(found, state, opponents)
        write_json(
            self._directory.ladder,
            {"best": _name(best), "judge": "scores" if labeler is None else labeler.kind, "drift": drift}
            | found.to_json(),
        )
        return best

    def _fitted(self, comparisons: Sequence[Comparison]) -> ladder.Ladder:
        settings = self._config.rounds.evaluation
        return ladder.fit_ladder(
            comparisons,
            anchor=_name(0),
            confidence=settings.confidence,
            bootstrap_resamples=settings.bootstrap_resamples,
            seed=self._config.run.seed,
        )

    def _labeler(self, state: RunState) -> LabelerConfig | None:
        named = self._config.rounds.evaluation.labeler
        return self._config.rounds.of(state.round).labeler if named is None else named

    def _opponents(self, state: RunState) -> list[int]:
        names = self._config.rounds.evaluation.opponents
        versions = dict.fromkeys(schedule.named_version(name, state) for name in names)
        return [version for version in versions if version != state.policy_version] or [0]

    def _ask(self, state: RunState, version: int, opponents: Sequence[int], *, overlap: int) -> None:
        """Make the tasks that place the new version, all in one transaction."""
        if self._store.tasks(round=state.round, purpose="evaluation"):
            return
        texts = {number: self._responses(number) for number in (version, *opponents)}
        tasks: list[Task] = []
        for opponent in opponents:
            pairs = list(zip(texts[version], texts[opponent], strict=True))
            for ours, theirs in pairs[: self._config.rounds.evaluation.num_comparisons]:
                if self._text(ours) != self._text(theirs):
                    tasks.append(self._task(state.round, {version: ours, opponent: theirs}))
        self._store.add_tasks([replace(task, overlap=overlap) for task in tasks])

    def _task(self, round: int, responses: Mapping[int, Rollout]) -> Task:
        prompt = next(iter(responses.values())).prompt
        task_id = stable_id("evaluation", round, prompt.prompt_id, *responses)
        candidates = [
            Candidate(
                candidate_id=stable_id(task_id, version, self._config.run.seed)[:12],
                text=self._text(rollout),
                policy=_name(version),
                policy_version=version,
                finish_reason=rollout.finish_reason,
                token_ids=tuple(rollout.response_ids.tolist()),
            )
            for version, rollout in responses.items()
        ]
        return Task(
            task_id=task_id,
            round=round,
            kind="pair",
            purpose="evaluation",
            prompt_id=prompt.prompt_id,
            prompt=prompt.source,
            candidates=tuple(sorted(candidates, key=lambda candidate: candidate.candidate_id)),
            metadata=dict(prompt.metadata),
        )

    def _labelled(self, round: int) -> list[Comparison]:
        labeled = self._store.labeled(round=round, purpose="evaluation")
        return [c for entry in labeled for label in entry.labels if (c := _comparison(entry, label)) is not None]

    def _ties(self, round: int, version: int, opponents: Sequence[int], *, weight: float) -> list[Comparison]:
        """Count the same responses as ties, in proportion to how many of the others have been judged."""
        progress = self._store.progress(round=round, purpose="evaluation")
        judged = progress.judgements / (progress.tasks * weight) if progress.tasks else 1.0
        return [c for other in opponents for c in self._same(version, other, weight=weight * min(judged, 1.0))]

    def _same(self, version: int, opponent: int, *, weight: float) -> list[Comparison]:
        """Count prompts to which both versions gave the very same response as ties; nobody is asked about them."""
        pairs = list(zip(self._responses(version), self._responses(opponent), strict=True))
        if weight == 0:
            return []
        return [
            Comparison(
                first=_name(version),
                second=_name(opponent),
                prompt_id=ours.prompt.prompt_id,
                outcome=0.5,
                weight=weight,
                length_difference=0.0,
                judge="identical",
            )
            for ours, theirs in pairs[: self._config.rounds.evaluation.num_comparisons]
            if self._text(ours) == self._text(theirs)
        ]

    def _scored(self, version: int, opponent: int) -> list[Comparison]:
        """Without a labeler, compare by the score that evaluations are judged by."""
        ours, theirs = self._evaluated(version), self._evaluated(opponent)
        return [
            Comparison(
                first=_name(version),
                second=_name(opponent),
                prompt_id=prompt_id,
                outcome=0.5 if judged == theirs.judged[prompt_id] else float(judged > theirs.judged[prompt_id]),
                length_difference=float(ours.response_tokens[prompt_id] - theirs.response_tokens[prompt_id]),
                judge=ours.judge,
            )
            for prompt_id, judged in ours.judged.items()
        ]

    def _promoted(self, state: RunState, found: ladder.Ladder) -> int:
        """Make the round's policy the best where it is ahead of the incumbent beyond doubt."""
        version, incumbent = state.policy_version, state.best_version
        if version == incumbent:
            return incumbent
        lead = ladder.lead(found, _name(version), over=_name(incumbent))
        figures = f"{lead.elo:+.0f} Elo over {_name(incumbent)} [{lead.ci_low:+.0f}, {lead.ci_high:+.0f}]"
        if lead.ci_low > 0:
            self._say(f"policy {_name(version)} is the best so far: {figures}")
            return version
        _LOG.warning("policy %s is not promoted, %s stays the best: %s", _name(version), _name(incumbent), figures)
        return incumbent

    def _drift(self, found: ladder.Ladder, state: RunState, opponents: Sequence[int]) -> list[dict[str, Any]]:
        """Compare the lead that the reward model predicts with the measured one.

        Only a lone reward model predicts one, trained without margins: its raw scores are log-odds.
        """
        rewards = self._config.scoring.rewards
        if len(rewards) != 1 or not isinstance(rewards[0], ModelRewardConfig):
            return []
        if self._config.learner.reward_model.margin != "none":
            return []
        constants = json.loads(self._directory.calibrations(state.round).read_text())[rewards[0].name]
        version = state.policy_version
        scores = {
            _name(number): {
                prompt: score / constants["gain"]
                for prompt, score in self._evaluated(number).components[rewards[0].name].items()
            }
            for number in (version, *opponents)
        }
        drifts = [ladder.drift(found, scores, version=_name(version), over=_name(other)) for other in opponents]
        for drift in drifts:
            if drift.alarm:
                _LOG.warning(
                    "the reward model overrates %s: it predicts %+.0f Elo over %s, measured are %+.0f [%+.0f, %+.0f]",
                    drift.version,
                    drift.predicted_elo,
                    drift.over,
                    drift.measured_elo,
                    *drift.ci,
                )
        return [asdict(drift) for drift in drifts]

    def _responses(self, version: int) -> list[Rollout]:
        return samples.read(self._directory.evaluation_of(version))

    def _text(self, rollout: Rollout) -> str:
        return self._decode(rollout.response_ids.tolist())

    def _keep(self, round: int, comparisons: Sequence[Comparison]) -> None:
        write_json(self._directory.round(round) / "comparisons.json", [asdict(c) for c in comparisons])

    def _kept(self, round: int) -> list[Comparison]:
        values = json.loads((self._directory.round(round) / "comparisons.json").read_text())
        return [Comparison(**value) for value in values]


def _name(version: int) -> str:
    return f"v{version:03d}"


def _comparison(entry: LabeledTask, label: Label) -> Comparison | None:
    """Turn a label into a comparison; a skip or an invalid label says nothing about who is better."""
    outcomes = {"tie": 0.5, "both_bad": 0.5}
    if label.outcome.verdict in ("skip", "invalid"):
        return None
    first, second = entry.task.candidates
    outcome = outcomes.get(label.outcome.verdict, float(label.outcome.winner == first.candidate_id))
    shown_first = entry.task.candidate(label.presented[0])
    return Comparison(
        first=first.policy,
        second=second.policy,
        prompt_id=entry.task.prompt_id,
        outcome=outcome,
        length_difference=float(_length(first) - _length(second)),
        judge=label.labeler_kind,
        labeler=label.labeler_id,
        shown_first=shown_first.policy,
    )


def _length(candidate: Candidate) -> int:
    return len(candidate.text) if candidate.token_ids is None else len(candidate.token_ids)
