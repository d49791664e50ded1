"""The scoring workers as one role: groups by key, scored by reward and reference workers while generation goes on."""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray

from cluster import schedule
from cluster.deadlines import Deadlines
from cluster.pool import Anywhere, Member, Places, Pool, Report
from cluster.supervision import FAILURES, LATE, DeadlineError, Handle, Vigil, Watch, result_of, wait
from configs.cluster import DeadlinesConfig
from configs.scoring import HELDOUT, ModelRewardConfig, ScoringConfig
from protocol import metrics as names
from protocol.messages import ReferenceSummary, RewardScores, RolloutKey
from protocol.records import Text
from protocol.roles import Finished, ScoredGroup, ScoredReferences, ScoringSummary


class _Sent(NamedTuple):
    """A group that a worker has been asked about, and references to what it says."""

    worker: Member
    report: Any
    """For the driver."""
    for_learner: Any


class ScoringPool:
    """Reward and reference workers behind the ScoringPool role."""

    def __init__(
        self,
        config: ScoringConfig,
        deadlines: DeadlinesConfig,
        *,
        make_reward: Callable[[int, str], Handle],
        make_reference: Callable[[int, str], Handle],
        replacements: int,
        report: Report,
        places: tuple[Places, Places] | None = None,
    ) -> None:
        self._config = config
        self._measured = Deadlines(deadlines)
        self._watch = Watch(silence_s=deadlines.silence_s)
        supervised: dict[str, Any] = {"deadlines": deadlines, "replacements": replacements, "report": report}
        rewards, references = places or (Anywhere(range(config.workers)), Anywhere(range(config.reference_workers)))
        self.rewards = Pool(role="reward", places=rewards, make=make_reward, **supervised)
        self.references = Pool(role="reference", places=references, make=make_reference, **supervised)
        self._loaded: dict[str, Any] = {}
        """What every reward worker has loaded since it started; a replacement loads it too."""
        self._groups: tuple[tuple[RolloutKey, ...], ...] = ()
        self._group_of: dict[RolloutKey, int] = {}
        self._arrived: list[dict[RolloutKey, Finished]] = []
        self._rewards: dict[int, _Sent] = {}
        self._references: dict[int, _Sent] = {}
        self._first_sent = 0.0

    @property
    def _trained(self) -> str | None:
        """The reward whose model this run trains."""
        rewards = self._config.rewards
        return next((r.name for r in rewards if isinstance(r, ModelRewardConfig) and r.path == "trained"), None)

    def started(self) -> dict[str, str]:
        """Wait until every model is loaded, and say on which node each worker is."""
        return self.rewards.started() | self.references.started()

    def begin(self, keys: Sequence[RolloutKey]) -> None:
        """Fix the groups of a batch."""
        self._groups = schedule.groups(keys, size=self._config.group_responses)
        self._group_of = {key: index for index, group in enumerate(self._groups) for key in group}
        self._arrived = [{} for _ in self._groups]
        self._rewards, self._references = {}, {}

    def add(self, finished: Finished) -> None:
        """Take a response; send its group off when it is the group's last."""
        index = self._group_of[finished.meta.key]
        self._arrived[index][finished.meta.key] = finished
        if len(self._arrived[index]) == len(self._groups[index]):
            self._first_sent = monotonic() if not self._rewards else self._first_sent
            self._rewards[index] = self._ask_rewards(index)
            self._references[index] = self._ask_reference(index)

    def collect(self) -> ScoredReferences:
        """Wait for all groups, in key order; what a lost worker owed is asked of its replacement.

        What is measured begins with the first group sent: what the workers compute fits in that, however much of it
        was hidden behind generation.
        """
        missing = [str(key) for i, group in enumerate(self._groups) if i not in self._rewards for key in group]
        if missing:
            raise RuntimeError(f"{len(missing)} responses were never handed over for scoring, such as {missing[0]}")
        order = range(len(self._groups))
        with self._measured.measuring("score", "batch", size=len(self._group_of), since=self._first_sent):
            rewards, references = self._reports()
        scored = tuple(
            ScoredGroup(
                metas=tuple(self._arrived[i][key].meta for key in self._groups[i]),
                rollouts=tuple(self._arrived[i][key].payload for key in self._groups[i]),
                rewards=self._rewards[i].for_learner,
                reference=self._references[i].for_learner,
            )
            for i in order
        )
        return ScoredReferences(groups=scored, summary=summarise(rewards, references, trained=self._trained))

    def raw_scores(self, payloads: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        """Score rollouts without calibration.

        Args:
            payloads: References to Rollouts.

        Returns:
            Component name -> [B] raw scores, in the order given.
        """
        size = self._config.group_responses
        parts = [payloads[start : start + size] for start in range(0, len(payloads), size)]

        def ask() -> list[Any]:
            return [self._turn(i).raw_scores.remote(list(part)) for i, part in enumerate(parts)]

        scored: list[dict[str, NDArray[np.float32]]] = self._answers(ask, "raw scores")
        return {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}

    def score_texts(self, path: str, prompts: Sequence[Text], responses: Sequence[str]) -> NDArray[np.float32]:
        """Have a reward model that rewards nothing score texts, raw: the labeler `reward_model`.

        Args:
            path: The model's directory or hub id.
            prompts: [B] text or messages.
            responses: [B] one response each.

        Returns:
            [B] scores, in the order given.
        """
        size = self._config.group_responses

        def ask() -> list[Any]:
            return [
                self._turn(n).score_texts.remote(path, prompts[at : at + size], responses[at : at + size])
                for n, at in enumerate(range(0, len(prompts), size))
            ]

        return np.concatenate(self._answers(ask, "scores for labels"))

    def load(self, *, trained: Path | None, heldout: Path | None) -> None:
        """Give every reward worker a round's reward models."""
        self._loaded = {"trained": trained, "heldout": heldout}
        self._tell(self._loaded, "loading reward models")

    def use(self, calibrations: Mapping[str, Any]) -> None:
        """Give every reward worker the zero and unit of its components."""
        self._loaded["calibrations"] = calibrations
        self._tell({"calibrations": calibrations}, "setting calibrations")

    def stop(self) -> None:
        """Stop every worker."""
        self.rewards.stop()
        self.references.stop()

    def _turn(self, number: int) -> Handle:
        """Deal work out in turn: which worker gets it depends on its number alone."""
        return self.rewards.members[number % len(self.rewards.members)].handle

    def _payloads(self, index: int) -> list[Any]:
        return [self._arrived[index][key].payload for key in self._groups[index]]

    def _ask_rewards(self, index: int) -> _Sent:
        """Send a group to a reward worker; which one depends on the group's number alone."""
        worker = self.rewards.members[index % len(self.rewards.members)]
        # The report has the gold scores, what the learner gets has not.
        report, scores = worker.handle.score.remote(self._payloads(index))
        return _Sent(worker, report, scores)

    def _ask_reference(self, index: int) -> _Sent:
        worker = self.references.members[index % len(self.references.members)]
        report, logprobs = worker.handle.logprobs.remote(self._payloads(index))
        return _Sent(worker, report, logprobs)

    def _reports(self) -> tuple[list[RewardScores], list[ReferenceSummary]]:
        """Wait for what all workers report, whoever is first; where one is lost, ask the one that takes its place."""
        found: dict[tuple[str, int], Any] = {}
        vigil = Vigil(self._watch)
        began = monotonic()
        while owed := self._owed(found):
            seconds, key = self._measured.bound("score", "batch", size=len(self._group_of))
            left = max(0.0, began + seconds - monotonic())
            ready, _ = ray.wait([sent.report for sent in owed.values()], timeout=min(left, vigil.poll_s))
            lost: dict[str, tuple[Member, BaseException]] = {}
            for (role, index), (worker, report, _) in owed.items():
                if report in ready and worker.name not in lost:
                    try:
                        found[role, index] = result_of(report)
                        vigil.heard(worker)
                    except LATE as error:
                        lost[worker.name] = worker, error
            workers = {sent.worker.name: sent.worker for sent in owed.values()}
            for worker, answer in vigil.answers([w for name, w in workers.items() if name not in lost]):
                if isinstance(answer, FAILURES):
                    lost[worker.name] = worker, answer
            if not lost and monotonic() >= began + seconds:
                for (role, index), sent in reversed(self._owed(found).items()):
                    text = f"{role} scores of the group of {self._groups[index][0]}: {sent.worker.name} did not finish"
                    lost[sent.worker.name] = sent.worker, DeadlineError(f"{text} within {key} = {seconds:.4g} s")
            for worker, error in lost.values():
                self._ask_another(worker, error, found)
                began = monotonic()
        order = range(len(self._groups))
        return [found["reward", i] for i in order], [found["reference", i] for i in order]

    def _owed(self, found: Container[tuple[str, int]]) -> dict[tuple[str, int], _Sent]:
        """List what has been asked for and is not found yet, by role and group."""
        sent = [(pool.role, i, s) for pool, asked in self._asked for i, s in sorted(asked.items())]
        return {(role, i): s for role, i, s in sent if (role, i) not in found}

    def _ask_another(self, lost: Member, error: BaseException, found: Container[tuple[str, int]]) -> None:
        """Have a lost worker replaced, and ask those that are there now for what it owes."""
        for pool, sent in self._asked:
            if pool.holds(lost):
                self._replace(pool, lost, error)
                ask = self._ask_rewards if pool is self.rewards else self._ask_reference
                for index in [i for i, s in sent.items() if s.worker is lost and (pool.role, i) not in found]:
                    sent[index] = ask(index)

    @property
    def _asked(self) -> tuple[tuple[Pool, dict[int, _Sent]], ...]:
        return (self.rewards, self._rewards), (self.references, self._references)

    def _replace(self, pool: Pool, lost: Member, error: BaseException) -> None:
        """Have a worker replaced; where there is no room for another, the others take its groups."""

        def admit(fresh: Member) -> None:
            pool.admit(fresh)
            if pool is self.rewards:
                self._wait([fresh.handle.load.remote(**self._loaded)], f"loading {fresh.name}", [fresh])

        self._measured.forget()
        pool.refill(lost, cause=error, admit=admit)

    def _tell(self, what: Mapping[str, Any], why: str) -> None:
        """Have every reward worker load something."""
        self._answers(lambda: [member.handle.load.remote(**what) for member in self.rewards.members], why)

    def _answers(self, ask: Callable[[], list[Any]], what: str) -> list[Any]:
        """Ask reward workers something; where one is lost meanwhile, replace it and ask again.

        Raises:
            DeadlineError: If workers that answer do not finish within the configured bound.
        """
        while True:
            try:
                return self._wait(ask(), what, self.rewards.members)
            except FAILURES:
                for member, error in self._watch.lost(self.rewards.members):
                    self._replace(self.rewards, member, error)

    def _wait(self, refs: list[Any], what: str, workers: Sequence[Member]) -> list[Any]:
        seconds, key = self._measured.bound("score")
        return wait(refs, deadline_s=seconds, what=what, key=key, watch=self._watch, workers=workers)


def summarise(
    rewards: Sequence[RewardScores], references: Sequence[ReferenceSummary], *, trained: str | None = None
) -> ScoringSummary:
    """Collect what the driver may know about the scores of a batch.

    Args:
        rewards: What the reward workers said.
        references: What the reference workers said.
        trained: The reward that the held-out reward model is compared with: both are calibrated, neither is charged.

    Returns:
        The summary.
    """
    scores = {key: float(s) for part in rewards for key, s in zip(part.keys, part.scores, strict=True)}
    kl = {key: nats for part in references for key, nats in part.behavior_kl_nats.items()}
    gold = {
        name: {key: float(g) for part in rewards for key, g in zip(part.keys, part.gold[name], strict=True)}
        for name in rewards[0].gold
    }
    components = {
        name: {key: float(s) for part in rewards for key, s in zip(part.keys, part.components[name], strict=True)}
        for name in rewards[0].components
    }
    means = {names.OBJECTIVE_SCORE: float(np.mean(list(scores.values())))}
    for name, values in components.items():
        means[names.SCORE_PREFIX + name] = float(np.mean(list(values.values())))
    if trained is not None and HELDOUT in components:
        means[names.HELDOUT_GAP] = means[names.SCORE_PREFIX + trained] - means[names.SCORE_PREFIX + HELDOUT]
    for name, values in gold.items():
        means[names.GOLD_PREFIX + name] = float(np.mean(list(values.values())))
    busy = {
        names.BUSY_REWARD: sum(part.busy_s for part in rewards),
        names.BUSY_REFERENCE: sum(part.busy_s for part in references),
    }
    return ScoringSummary(means=means, scores=scores, components=components, gold=gold, kl_nats=kl, busy_s=busy)
