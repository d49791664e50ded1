"""One rank of the learner: its stages, its engines and its state, without any knowledge of how it is called."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.algorithm import PolicyGradientBase
from configs.models import ModelsConfig
from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from configs.selection import SelectionBase
from learner import adapters, checkpoint, records, reward_modelling, supervised, weight_sender
from learner.assembly import Group, assemble
from learner.comparisons import RewardModelJob
from learner.engine import DeepSpeedEngine
from learner.experience import PassSettings
from learner.export import export_policy, padding_id
from learner.models import PolicyModel, ScalarModel, load_critic, load_policy, load_scalar, scalar_from_policy
from learner.pretraining import load_texts
from learner.selection_update import SelectionSettings, SelectionUpdater
from learner.stored_policy import StoredPolicy
from learner.supervised_loop import StageContext, beating, context_tokens, layout_of, stage_seed
from learner.training import GatherableNetwork, RankContext
from learner.trust import found_mismatch, found_negative_kl, is_kl_negative, require_version
from learner.update import Updater, UpdateSettings
from protocol import incidents
from protocol import metrics as names
from protocol.broadcast import Meeting
from protocol.errors import BatchRefusedError, NonFiniteError
from protocol.incidents import Incident
from protocol.messages import IntArray, RolloutKey, SampleText, ScoredBatch, UpdateReport
from protocol.tokens import decode, load_tokenizer
from protocol.weights import ByteArray, TensorSlot, WeightManifest

AnyUpdater = Updater | SelectionUpdater


class Rank:
    """What one rank does. All ranks do the same at the same time; rank 0 writes.

    Args:
        context: This rank's place.
        config: The run's configuration.
        run_directory: Of the run; a batch that cannot be learned from is kept under `incidents/`.
    """

    def __init__(self, context: RankContext, *, config: RunConfig, run_directory: Path) -> None:
        torch.set_num_threads(config.learner.threads_per_worker)
        self.context = context
        self.progress: dict[str, Any] = {}
        self.beats = 0  # of a stage: everything that it encodes, and every micro-batch
        self.policy_version: int | None = None
        # The version that the policy still is, bit for bit; None once it has been learned on or replaced.
        self._standing: int | None = None
        self._config = config
        self._incidents = run_directory / "incidents"
        self._updater: AnyUpdater | None = None
        self._published: GatherableNetwork | None = None  # the policy as it is sent
        self._tokenizer: Any = None
        self._batch: ScoredBatch | None = None
        self._kl_nats: Mapping[RolloutKey, float] = {}
        self._kl_beta = 0.0
        self._negative_kls = 0

    def train_sft(self, *, output: Path) -> dict[str, Any]:
        """Fine-tune the policy on demonstrations."""
        return supervised.train_sft(self._config, self._stage_context(), output=output, report=self._report)

    def train_reward_model(self, job: RewardModelJob) -> dict[str, Any]:
        """Train a reward model on comparisons."""
        return reward_modelling.train_reward_model(self._config, self._stage_context(), job=job, report=self._report)

    def finish_rl(self) -> None:
        """Give up the engines of policy and critic, and their memory."""
        if self._updater is not None:
            for engine in self._updater.engines.values():
                engine.close()
        self._updater = self._published = self._standing = None
        self._negative_kls = 0

    def start_rl(self, *, policy: Path, reward_model: Path | None, iterations: int) -> None:
        """Build the engines of policy and, where there is one, critic; those of a round before are given up.

        Args:
            policy: The directory that the policy starts from.
            reward_model: This round's reward model, if one was trained.
            iterations: Of the round; the schedules of the learning rates end with it.
        """
        self.finish_rl()
        config = self._config
        learner, algorithm = config.learner, config.algorithm
        models, network = config.models, self._open(policy)
        self._tokenizer = load_tokenizer(policy)
        steps = config.minibatches_per_epoch * algorithm.num_epochs
        policy_iterations = max(1, iterations - algorithm.warmup_iterations)
        make = partial(DeepSpeedEngine, settings=learner, context=self.context)
        critic = None
        if algorithm.has_critic:
            module = make_critic(config, policy=policy, reward_model=reward_model)
            adapters.choose(module, models.critic.train, seed=self._adapter_seed, where="models.critic.train")
            critic = make(module, optimizer=learner.critic_optimizer, name="critic", total_steps=steps * iterations)
        layout = layout_of(network, learner)
        longest = min(context_tokens(network) or learner.micro_batch_tokens, learner.micro_batch_tokens)
        policy_engine = make(
            network, optimizer=learner.policy_optimizer, name="policy", total_steps=steps * policy_iterations
        )
        self._published = self._as_published(policy_engine)
        passes = PassSettings(
            temperature=config.rollout.temperature,
            token_budget=learner.micro_batch_tokens,
            layout=layout,
            pad_id=padding_id(self._tokenizer),
        )
        guards = None if config.rollout.truncates_distribution else learner.guards
        if isinstance(algorithm, SelectionBase):
            choice = SelectionSettings(algorithm=algorithm, passes=passes, run_seed=config.run.seed, guards=guards)
            self._updater = SelectionUpdater(policy=policy_engine, settings=choice)
            return
        texts = []
        if config.data.pretraining is not None:
            texts = load_texts(config, self._tokenizer, longest=longest, engine=policy_engine)
        self._updater = Updater(
            policy=policy_engine,
            critic=critic,
            texts=texts,
            settings=UpdateSettings(
                algorithm=algorithm,
                passes=passes,
                max_response_tokens=config.rollout.max_response_tokens,
                run_seed=config.run.seed,
                guards=guards,
            ),
        )

    def update(self, groups: Sequence[Group], *, round: int, iteration: int) -> UpdateReport:
        """Learn from scored groups.

        Args:
            groups: Every rollout of the iteration in one of them.
            round: Which round.
            iteration: Which iteration of it, from zero.

        Returns:
            What happened.

        Raises:
            BatchRefusedError: If a number is not finite, or the batch is of another policy version than the learner's;
                the batch is kept in the run's incidents.
        """
        updater = self._running()
        self._standing = None
        version = -1 if self.policy_version is None else self.policy_version
        batch = assemble(groups, round=round, iteration=iteration, policy_version=version)
        self._batch, self._kl_nats, self._kl_beta = batch, {}, updater.reward_kl_beta
        try:
            require_version(batch, source=self._config.rollout.source)
            report = updater.update(batch)
        except BatchRefusedError as error:
            rolls_back = self._config.learner.on_nonfinite == "rollback"
            action = "all ranks go back to the last checkpoint" if rolls_back else "the run stops"
            kind = "nonfinite" if isinstance(error, NonFiniteError) else "untrusted_batch"
            self._keep(batch, kind, str(error), action=action)
            # The first complaint ends the group: it must not come before the first rank has written.
            updater.policy.all_reduce_sum(torch.zeros(1, device=self.context.device))
            raise
        self._kl_nats = report.kl_nats_per_sequence
        if report.num_skipped_steps:
            what = f"the loss or gradient of {report.num_skipped_steps} steps was not finite"
            self._keep(batch, "nonfinite", what, action="these steps were skipped")
        if isinstance(self._config.algorithm, PolicyGradientBase):
            self._watch(batch, report, algorithm=self._config.algorithm)
        return report

    def publish(self, policy_version: int) -> Iterator[ByteArray | WeightManifest]:
        """Publish the policy; rank 0 yields buckets and manifest, the others nothing."""
        yield from weight_sender.publish(
            self._sent(),
            policy_version=policy_version,
            bucket_bytes=self._bucket_bytes,
            dtype=self._config.rollout.dtype,
        )
        self.policy_version = self._standing = policy_version

    def announce(self, policy_version: int) -> WeightManifest | None:
        """Publish the policy without sending it: gather it once for its manifest, which rank 0 returns."""
        manifest = None
        for item in self.publish(policy_version):
            manifest = item if isinstance(item, WeightManifest) else None
        return manifest

    def broadcast(
        self, policy_version: int, meeting: Meeting | None, *, receivers: int, timeout_s: float
    ) -> str | None:
        """Send an announced version to those that join; say why not all of them got it (weight_sender.broadcast).

        Raises:
            RuntimeError: If the policy is not that version any more.
        """
        slots = self._standing_slots(policy_version)
        return weight_sender.broadcast(self._sent(), slots, meeting, receivers=receivers, timeout_s=timeout_s)

    def buckets(self, policy_version: int) -> Iterator[ByteArray]:
        """Gather an announced version once more; rank 0 yields its buckets, the others nothing.

        Raises:
            RuntimeError: If the policy is not that version any more.
        """
        for bucket in weight_sender.buckets(self._sent(), self._standing_slots(policy_version)):
            if self.context.rank == 0:
                yield bucket

    def publish_stored(self, policy_version: int, directory: Path) -> Iterator[ByteArray | WeightManifest]:
        """Publish a policy that was exported before, under its own version; rank 0 does it alone."""
        if self.context.rank != 0:
            return
        alone = self._config.rollout.publish == "adapter"
        policy = self._open(directory) if alone else load_policy(directory, precision=self._config.learner.precision)
        yield from weight_sender.publish(
            self._as_published(StoredPolicy(policy, self.context)),
            policy_version=policy_version,
            bucket_bytes=self._bucket_bytes,
            dtype=self._config.rollout.dtype,
        )

    def samples(self, keys: Sequence[RolloutKey]) -> tuple[SampleText, ...]:
        """Decode a few responses of the last batch."""
        return records.samples(
            self._last_batch(), keys, decode=self._decode, kl_nats=self._kl_nats, kl_beta=self._kl_beta
        )

    def write_rollouts(self, path: Path) -> None:
        """Write the last batch as Parquet."""
        records.write_batch(path, self._last_batch(), decode=self._decode, kl_nats=self._kl_nats)

    def save(self, directory: Path) -> None:
        """Write all state."""
        updater = self._running()
        controller = None if updater.controller is None else updater.controller.state_dict()
        state = checkpoint.LearnerState(
            policy_version=self.policy_version,
            kl_controller=controller,
            world_size=self.context.world_size,
            zero_stage=self._config.learner.zero_stage,
            negative_kls=self._negative_kls,
        )
        checkpoint.save(directory, engines=updater.engines, state=state)
        if updater.memory is not None and self.context.rank == 0:
            updater.memory.write(directory)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote; the files must have been verified."""
        updater = self._running()
        self._standing = None
        state = checkpoint.load(directory, engines=updater.engines, zero_stage=self._config.learner.zero_stage)
        self.policy_version, self._negative_kls = state.policy_version, state.negative_kls
        if updater.controller is not None and state.kl_controller is not None:
            updater.controller.load_state_dict(state.kl_controller)
        self.carry_over(directory)

    def carry_over(self, directory: Path) -> None:
        """Restore of what `save` wrote that which outlives a round; the files must have been verified."""
        updater = self._running()
        if updater.memory is not None:
            updater.memory.read(directory)

    def export(self, directory: Path, *, card: Mapping[str, Any]) -> None:
        """Write the policy as a plain Hugging Face directory."""
        export_policy(self._running().policy, self._tokenizer, directory, card=card)

    def _watch(self, batch: ScoredBatch, report: UpdateReport, *, algorithm: PolicyGradientBase) -> None:
        """Report what shows that the engine did not sample from the policy that the learner holds."""
        # Truncated sampling, which the guards leave alone too: log-ratios are then no estimate of this policy's KL.
        is_negative = not self._config.rollout.truncates_distribution and is_kl_negative(report)
        self._negative_kls = self._negative_kls + 1 if is_negative else 0
        k3, kl = (report.metrics.get(name, 0.0) for name in (names.SYNC_K3_LAG0, names.OBJECTIVE_KL))
        for incident in (
            found_mismatch(batch, k3=k3, bound=algorithm.correction.alarm_k3),
            found_negative_kl(batch, kl=kl, in_a_row=self._negative_kls, bound=algorithm.alarm_negative_kl),
        ):
            if incident is not None and self.context.rank == 0:
                name = f"{incident.kind}-r{batch.round:03d}-i{batch.iteration:06d}"
                incidents.write(self._incidents, incident, name=name)

    @property
    def _bucket_bytes(self) -> int:
        return int(self._config.learner.bucket_mib * 2**20)

    def _standing_slots(self, policy_version: int) -> tuple[TensorSlot, ...]:
        if policy_version != self._standing:
            raise RuntimeError(
                f"policy version {policy_version} cannot be sent again: the policy "
                + ("has changed since it was published" if self._standing is None else f"is version {self._standing}")
            )
        return weight_sender.plan(self._sent(), bucket_bytes=self._bucket_bytes, dtype=self._config.rollout.dtype)

    @property
    def _adapter_seed(self) -> int:
        return stage_seed(self._config.run.seed, "adapter")

    def _open(self, policy: Path) -> PolicyModel:
        """Load a policy with what is trained of it; where it has no adapter yet, with one that adds nothing."""
        train, precision = self._config.models.policy.train, self._config.learner.precision
        return adapters.open_policy(policy, train, precision=precision, seed=self._adapter_seed)

    def _as_published(self, policy: GatherableNetwork) -> GatherableNetwork:
        return adapters.Alone(policy) if self._config.rollout.publish == "adapter" else policy

    def _sent(self) -> GatherableNetwork:
        if self._published is None:
            raise RuntimeError("start_rl comes first")
        return self._published

    def _running(self) -> AnyUpdater:
        if self._updater is None:
            raise RuntimeError("start_rl comes first")
        return self._updater

    def _last_batch(self) -> ScoredBatch:
        if self._batch is None:
            raise RuntimeError("no batch has been learned from yet")
        return self._batch

    def _decode(self, token_ids: IntArray) -> str:
        return decode(self._tokenizer, token_ids.tolist())

    def _report(self, figures: Mapping[str, Any]) -> None:
        self.progress = dict(figures)

    def _beat(self) -> None:
        self.beats += 1

    def _stage_context(self) -> StageContext:
        self.progress = {}  # the figures of the stage before are not this one's
        place = self.context
        make = beating(partial(DeepSpeedEngine, settings=self._config.learner, context=place), self._beat)
        return StageContext(
            rank=place.rank, world_size=place.world_size, device=place.device, make_engine=make, beat=self._beat
        )

    def _keep(self, batch: ScoredBatch, kind: str, what: str, *, action: str) -> None:
        """Keep a batch that could not be learned from, so that it can be replayed (records.read_batch)."""
        if self.context.rank != 0:
            return
        updater = self._running()
        name = f"{kind}-r{batch.round:03d}-i{batch.iteration:06d}"
        records.write_batch(
            self._incidents / f"{name}.parquet",
            batch,
            decode=self._decode,
            kl_nats={},
            computed={name: [part.tolist() for part in parts] for name, parts in updater.computed.items()},
            settings={"run_seed": self._config.run.seed, "kl_beta": self._kl_beta},
        )
        incident = Incident(
            kind=kind,
            what=what,
            where="learner",
            action=action,
            round=batch.round,
            iteration=batch.iteration,
            policy_version=batch.policy_version,
            data={
                "batch": f"{name}.parquet",
                "policy_steps": updater.policy.num_steps,
                "critic_steps": 0 if updater.critic is None else updater.critic.num_steps,
            },
        )
        incidents.write(self._incidents, incident, name=name)


def make_critic(config: RunConfig, *, policy: Path, reward_model: Path | None) -> ScalarModel:
    """Build the critic that `models.critic.init` names.

    Args:
        config: The run's configuration.
        policy: The policy's directory.
        reward_model: This round's reward model, if one was trained.

    Returns:
        A network of its own.

    Raises:
        UserError: If it cannot be loaded.
    """
    models: ModelsConfig = config.models
    precision = config.learner.precision
    if models.critic.init == "policy":
        return scalar_from_policy(policy, seed=config.run.seed, precision=precision)
    if models.critic.init != "reward":
        return load_scalar(models.critic.init, precision=precision)
    if reward_model is None:
        # The configuration has checked that there is a reward model, so it is a finished one.
        named = next(reward for reward in config.scoring.rewards if isinstance(reward, ModelRewardConfig))
        return load_critic(named.path, precision=precision)
    return load_critic(reward_model, precision=precision)
