"""The workers of a run: started when they are first needed, given back while the run waits for people."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cluster.learner_group import LearnerGroup
from cluster.pool import Member
from cluster.rollout_pool import RolloutPool
from cluster.run_directory import RunDirectory
from cluster.scoring_pool import ScoringPool
from configs.rollout import RolloutConfig


class Builder(Protocol):
    """Makes workers in their places."""

    def learner(self) -> LearnerGroup:
        """Start the learner's ranks."""
        ...

    def pools(self) -> tuple[RolloutPool, ScoringPool]:
        """Start the rollout and scoring workers; the rollout workers hold version 0."""
        ...

    def judge(self, model: str, config: RolloutConfig) -> RolloutPool:
        """Start engines of another model in the rollout workers' places."""
        ...

    def release(self) -> None:
        """Give all places back to the cluster."""
        ...

    def draining(self) -> set[str]:
        """Name the nodes that are about to go."""
        ...


class Crew:
    """Everybody who works on a run, and which policy version the rollout workers hold."""

    def __init__(self, builder: Builder, directory: RunDirectory) -> None:
        self._builder = builder
        self._directory = directory
        self._learner: LearnerGroup | None = None
        self._pools: tuple[RolloutPool, ScoringPool] | None = None
        self._held: int | None = None
        self._optimising: int | None = None
        self.generation = 0
        """Grows whenever rollout and scoring workers are started."""

    @property
    def learner(self) -> LearnerGroup:
        """The learner's ranks."""
        if self._learner is None:
            self._learner = self._builder.learner()
        return self._learner

    @property
    def updates(self) -> int | None:
        """Batches that the learner has been given; None while there is no learner."""
        return None if self._learner is None else self._learner.updates

    @property
    def rollouts(self) -> RolloutPool:
        """The rollout workers."""
        return self._started()[0]

    @property
    def scoring(self) -> ScoringPool:
        """The scoring workers."""
        return self._started()[1]

    def sampling(self, version: int) -> RolloutPool:
        """Bring the rollout workers to a policy that was exported, and return them."""
        rollouts = self.rollouts
        if self._held != version:
            path = self._directory.policy(version)
            rollouts.load(self.learner.publish_stored(path, policy_version=version))
            self._held = version
        return rollouts

    def publish(self, version: int) -> None:
        """Publish what the learner holds now as a version."""
        self.rollouts.load(self.learner.publish(policy_version=version))
        self._held = version

    def holds(self, version: int) -> None:
        """Take note of a version that an iteration has published."""
        self._held = version

    def optimises(self, round: int) -> bool:
        """Say whether the learner is in the middle of this round."""
        return self._optimising == round

    def start_rl(self, round: int, *, policy: Path, reward_model: Path | None, iterations: int) -> None:
        """Build the learner's engines for a round."""
        self.learner.start_rl(policy=policy, reward_model=reward_model, iterations=iterations)
        self._optimising = round

    def finish_rl(self) -> None:
        """Give up the learner's engines of a round."""
        if self._optimising is not None:
            self.learner.finish_rl()
            self._optimising = None

    def stop_learner(self) -> None:
        """Stop all ranks; the next one who needs the learner starts them again. Rollout and scoring workers stay."""
        if self._learner is not None:
            self._learner.stop()
        self._learner, self._optimising = None, None

    def ranks_to_go(self) -> list[str]:
        """Name the learner's ranks whose nodes are about to go."""
        draining = self._builder.draining()
        return [member.name for member in self.workers("learner") if member.node_id in draining]

    def workers(self, role: str) -> list[Member]:
        """List the workers of a role that have been started: rollout, reward, reference or learner."""
        if role == "learner":
            return [] if self._learner is None else list(self._learner.members)
        if self._pools is None:
            return []
        rollouts, scoring = self._pools
        return list({"rollout": rollouts, "reward": scoring.rewards, "reference": scoring.references}[role].members)

    @contextmanager
    def judging(self, model: str, config: RolloutConfig) -> Iterator[RolloutPool]:
        """Put engines of another model in the rollout workers' places, for as long as they are used."""
        self._stop_pools()
        pool = self._builder.judge(model, config)
        try:
            yield pool
        finally:
            pool.stop()

    def release(self) -> None:
        """Stop every worker and give the places back; the next one who needs workers starts them again."""
        self._stop_pools()
        self.stop_learner()
        self._builder.release()

    def _stop_pools(self) -> None:
        if self._pools is not None:
            for pool in self._pools:
                pool.stop()
        self._pools, self._held = None, None

    def _started(self) -> tuple[RolloutPool, ScoringPool]:
        if self._pools is None:
            self._pools = self._builder.pools()
            self._held = 0
            self.generation += 1
        return self._pools
