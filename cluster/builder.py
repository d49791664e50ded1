"""Makes the workers of a run, each in its place."""

from collections.abc import Callable, Mapping

from actors import worker as rollout_worker
from cluster import placement, trained_parts
from cluster.elastic import Elastic, Surroundings
from cluster.learner_group import LearnerGroup
from cluster.placement import Placement
from cluster.pool import Pool, Report
from cluster.rollout_pool import RolloutPool
from cluster.run_directory import RunDirectory
from cluster.scoring_pool import ScoringPool
from cluster.supervision import Handle
from configs.models import LoraConfig
from configs.rollout import RolloutConfig
from configs.run import RunConfig
from learner import worker as learner_worker
from protocol.files import write_json
from reward_service import worker as scoring_worker


class Builder:
    """Makes the workers of a run, each in its place."""

    def __init__(self, config: RunConfig, directory: RunDirectory, *, report: Report) -> None:
        self._config = config
        self._report = report
        self._directory = directory
        self._placement: Placement | None = None
        self._nodes: dict[str, str] = {}

    @property
    def _groups(self) -> Placement:
        """The places, asked for when the first worker is."""
        if self._placement is None:
            deadline_s = self._config.cluster.deadlines.placement_s
            self._placement = Placement(placement.plan(self._config), deadline_s=deadline_s)
        return self._placement

    def release(self) -> None:
        """Give all places back to the cluster."""
        if self._placement is not None:
            self._placement.remove()
            self._placement = None

    def learner(self) -> LearnerGroup:
        """Start the learner's ranks."""
        config = self._config
        remote = learner_worker.remote_class()
        environment = {"env_vars": learner_worker.environment(config)}
        places = self._groups.of("learner")

        def make(rank: int, name: str) -> Handle:
            options = places.options(rank)
            return remote.options(**options, runtime_env=environment).remote(
                rank=rank, world_size=config.learner.workers, config=config, run_directory=self._directory.root
            )

        group = LearnerGroup(config, make=make)
        self._nodes |= group.started(granted=places.granted)
        return group

    def pools(self) -> tuple[RolloutPool, ScoringPool]:
        """Start the rollout and scoring workers and wait until they have loaded their models."""
        config = self._config
        rollouts = self._rollouts(
            config.rollout, str(self._directory.policy(0)), follow=self._elastic, adapter=self._adapter()
        )
        places = self._groups.of("scoring")
        rewards = places.part(0, config.scoring.workers)
        references = places.part(config.scoring.workers, config.scoring.reference_workers)
        scoring = ScoringPool(
            config.scoring,
            config.cluster.deadlines,
            make_reward=lambda index, name: self._reward(rewards.options(index), name),
            make_reference=lambda index, name: self._reference(references.options(index), name),
            places=(rewards, references),
            replacements=config.cluster.worker_replacements,
            report=self._report,
        )
        self._nodes |= rollouts.started() | scoring.started()
        write_json(self._directory.workers, self._nodes)
        return rollouts, scoring

    def judge(self, model: str, config: RolloutConfig) -> RolloutPool:
        """Start engines of another model in the rollout workers' places, which must be free."""
        pool = self._rollouts(config, model)
        pool.started()
        return pool

    def draining(self) -> set[str]:
        """Name the nodes that are about to go."""
        return placement.draining_nodes()

    def _elastic(self, pool: Pool) -> Elastic:
        surroundings = Surroundings(leaving=self._directory.leaving, draining=self.draining, note=self._note_rollouts)
        return Elastic(pool, self._groups.of("rollout"), self._config, surroundings)

    def _note_rollouts(self, nodes: Mapping[str, str]) -> None:
        present = {name: node for name, node in self._nodes.items() if not name.startswith("rollout-")} | dict(nodes)
        if present != self._nodes:
            self._nodes = present
            write_json(self._directory.workers, present)

    def _adapter(self) -> LoraConfig | None:
        """Describe the adapters that the rollout workers are sent, on version 0; none where weights are sent merged."""
        lora = self._config.models.policy.train.lora
        if lora is None or self._config.rollout.publish == "merged":
            return None
        names = lora.target_modules or tuple(sorted(trained_parts.linear_layers(self._directory.policy(0))))
        return lora.model_copy(update={"target_modules": names})

    def _rollouts(
        self,
        rollout: RolloutConfig,
        model: str,
        *,
        follow: Callable[[Pool], Elastic] | None = None,
        adapter: LoraConfig | None = None,
    ) -> RolloutPool:
        config = self._config
        places = self._groups.of("rollout")

        def make(index: int, name: str) -> Handle:
            environment = rollout_worker.environment(rollout, config.cluster.backend)
            return (
                rollout_worker.remote_class()
                .options(**places.options(index), runtime_env={"env_vars": environment})
                .remote(
                    name=name,
                    model_path=model,
                    config=rollout,
                    backend=config.cluster.backend,
                    policy_version=0,
                    adapter=adapter,
                )
            )

        return RolloutPool(
            rollout,
            config.cluster.deadlines,
            make=make,
            replacements=config.cluster.worker_replacements,
            report=self._report,
            places=places,
            follow=follow,
        )

    def _reward(self, options: dict[str, object], name: str) -> Handle:
        config = self._config
        return (
            scoring_worker.reward_worker_class()
            .options(**options, runtime_env={"env_vars": scoring_worker.environment(config)})
            .remote(
                config=config,
                name=name,
                policy=self._directory.policy(0),
                incidents=self._directory.incidents,
            )
        )

    def _reference(self, options: dict[str, object], name: str) -> Handle:
        config = self._config
        reference = config.models.reference
        path = self._directory.policy(0) if reference == "sft" else reference
        return (
            scoring_worker.reference_worker_class()
            .options(**options, runtime_env={"env_vars": scoring_worker.environment(config)})
            .remote(config=config, name=name, path=path)
        )
