"""The whole configuration of a run, and every rule that spans sections."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from configs import addresses
from configs.algorithm import (
    AlgorithmConfig,
    APAConfig,
    AWRConfig,
    CorrectionConfig,
    PenalizedBase,
    PolicyGradientBase,
    PPOConfig,
)
from configs.base import Location, NonNegativeInt, Section
from configs.cluster import ClusterConfig
from configs.data import DataConfig
from configs.labels import JudgeConfig
from configs.learner import BatchGuardsConfig, LearnerConfig
from configs.models import ModelsConfig
from configs.rollout import RolloutConfig
from configs.rounds import RoundsConfig
from configs.scoring import TAKEN, HTTPRewardConfig, ModelRewardConfig, ScoringConfig
from configs.selection import RFTConfig
from configs.tracking import TrackingConfig

_SIBLINGS = 4
"""Responses to each prompt where an algorithm compares them and nobody has said how many."""
_MAX_SERVED_RANK = 512
"""The largest rank of an adapter that vLLM serves."""


class RunSection(Section):
    """What the run is called, where it is kept, and its seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=64)]
    dir: Location = "runs"
    """The directory that holds run directories; must outlive the job and, on a cluster, be shared by the nodes."""
    seed: NonNegativeInt = 0


class RunConfig(Section):
    """Everything that decides what a run does."""

    run: RunSection
    models: ModelsConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig
    rounds: RoundsConfig = RoundsConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def trains_reward_model(self) -> bool:
        """Whether the run trains reward models of its own."""
        return any(isinstance(r, ModelRewardConfig) and r.path == "trained" for r in self.scoring.rewards)

    @property
    def minibatches_per_epoch(self) -> int:
        """Optimiser steps in one pass over an iteration's responses, at most."""
        return -(-self.algorithm.learned_responses(self.rollout) // self.algorithm.minibatch_responses)

    @model_validator(mode="after")
    def _samples_as_the_algorithm_needs(self) -> Self:
        # The first rule, so that the others, and the config.yaml that a run keeps, see the number.
        if self.algorithm.compares_by is not None and "samples_per_prompt" not in self.rollout.model_fields_set:
            rollout = self.rollout.model_copy(update={"samples_per_prompt": _SIBLINGS})
            object.__setattr__(self, "rollout", rollout)  # the section is frozen for everyone but its own validation
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        responses, samples = self.rollout.responses_per_iteration, self.rollout.samples_per_prompt
        if responses % samples:
            raise ValueError(
                f"rollout.responses_per_iteration = {responses} does not divide by rollout.samples_per_prompt = "
                f"{samples} (without a value, {_SIBLINGS} where the algorithm compares a prompt's responses)"
            )
        minibatch, together = self.algorithm.minibatch_responses, self.algorithm.responses_together
        if isinstance(self.algorithm, PolicyGradientBase) and responses % minibatch:
            raise ValueError(
                f"rollout.responses_per_iteration = {responses} does not divide into minibatches of "
                f"algorithm.minibatch_responses = {minibatch}"
            )
        learned = self.algorithm.learned_responses(self.rollout)
        if minibatch > learned:
            raise ValueError(
                f"algorithm.minibatch_responses = {minibatch} is more than the {learned} responses that an iteration "
                f"of {self.algorithm.name} learns from"
            )
        if minibatch // together < self.learner.workers:
            raise ValueError(
                f"algorithm.minibatch_responses = {minibatch}{' (two to a pair)' * (together > 1)} is less than "
                f"learner.workers = {self.learner.workers} can share: some ranks would have nothing to do"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.learner.micro_batch_tokens < together * longest and together > 1:
            raise ValueError(
                f"learner.micro_batch_tokens = {self.learner.micro_batch_tokens} cannot hold one pair, twice "
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens"
            )
        for name, budget in (
            ("learner.micro_batch_tokens", self.learner.micro_batch_tokens),
            ("scoring.micro_batch_tokens", self.scoring.micro_batch_tokens),
        ):
            if budget < longest:
                raise ValueError(
                    f"{name} = {budget} cannot hold one sequence of rollout.max_prompt_tokens + "
                    f"rollout.max_response_tokens = {longest} tokens"
                )
        return self

    @model_validator(mode="after")
    def _length_rule_spares_some(self) -> Self:
        length, longest = self.scoring.length, self.rollout.max_response_tokens
        if length is not None and length.buffer_tokens >= longest:
            raise ValueError(
                f"scoring.length.buffer_tokens = {length.buffer_tokens} leaves no response free of charge: it must be "
                f"less than rollout.max_response_tokens = {longest}"
            )
        return self

    @model_validator(mode="after")
    def _data_can_be_learned_from(self) -> Self:
        algorithm, offline = self.algorithm, "rollout.source = data"
        if self.rollout.source == "policy":
            if self.data.responses is not None:
                raise ValueError(f"data.responses is not read by anything: set {offline}, or leave it out")
            return self
        if self.data.responses is None:
            raise ValueError(f"{offline} needs data.responses")
        if not isinstance(algorithm, APAConfig | AWRConfig):
            raise ValueError(
                f"algorithm.name = {algorithm.name} learns from the policy's own samples, and nobody recorded with "
                f"what probability the responses of data.responses were sampled: with {offline} use awr or apa"
            )
        if algorithm.compares_by is not None or self.rollout.samples_per_prompt > 1:
            raise ValueError(
                f"{offline} hands out one response at a time, so that nothing is compared within a prompt: set "
                "rollout.samples_per_prompt = 1 and algorithm.advantage = gae or reinforce"
            )
        return self._data_is_not_taken_for_samples(offline, algorithm)

    def _data_is_not_taken_for_samples(self, offline: str, algorithm: PolicyGradientBase) -> Self:
        """Refuse what would compare a response's log-probs with its sampler's, or take it for the policy's sample."""
        guards = self.learner.guards
        if (
            isinstance(algorithm, PenalizedBase)
            and algorithm.kl_beta > 0
            and (algorithm.kl_in == "reward" or algorithm.kl_controller.kind != "fixed")
        ):
            raise ValueError(
                f"{offline}: log-ratios at tokens that the policy did not sample are no estimate of its KL, so it can "
                "be neither charged in the reward nor steered: use algorithm.kl_in = loss with kl_estimator = k2 and a "
                "fixed kl_controller, or kl_beta = 0"
            )
        defaults = BatchGuardsConfig()
        bounded = any(bound not in (None, getattr(defaults, name)) for name, bound in guards)
        if algorithm.correction != CorrectionConfig() or bounded:
            raise ValueError(
                f"{offline}: algorithm.correction and learner.guards compare the learner with the engine that sampled, "
                "and none did: leave both as they are by default"
            )
        if algorithm.truncated_value != "terminal" or algorithm.alarm_negative_kl != 3:
            raise ValueError(
                f"{offline}: no response of the data was cut by a sampler, and log-ratios at its tokens are no KL, so "
                "algorithm.truncated_value and algorithm.alarm_negative_kl would do nothing: leave both out"
            )
        for number in range(1, self.rounds.count + 1):
            watched = self.rounds.of(number).guards.model_dump(exclude={"entropy_nats", "window_iterations"})
            for name in [name for name, bound in watched.items() if bound is not None]:
                raise ValueError(
                    f"{offline}: guards.{name} of round {number} watches what the policy samples, and the responses of "
                    "an iteration are not its samples; only entropy_nats is of the policy"
                )
        return self

    @model_validator(mode="after")
    def _correction_has_something_to_correct(self) -> Self:
        algorithm = self.algorithm
        if isinstance(algorithm, APAConfig | AWRConfig) and algorithm.correction.weight != "none":
            raise ValueError(
                f"algorithm.correction.weight = {algorithm.correction.weight} would change nothing: the loss of "
                f"{algorithm.name} fits targets, so that only what an older version sampled is reweighed, and every "
                "batch of a run is the current version's; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        algorithm = self.algorithm
        for number in range(1, self.rounds.count + 1):
            iterations = self.rounds.of(number).iterations
            if algorithm.warmup_iterations >= iterations:
                raise ValueError(
                    f"algorithm.critic_warmup_iterations = {algorithm.warmup_iterations} takes up all of round "
                    f"{number}, whose iterations are {iterations}, so that its policy would never move: use fewer, or "
                    "more rounds.iterations"
                )
        problem = algorithm.trouble(self.rollout) if isinstance(algorithm, PolicyGradientBase) else None
        if problem is not None:
            raise ValueError(f"algorithm.{problem}")
        return self

    @model_validator(mode="after")
    def _prompts_have_siblings(self) -> Self:
        algorithm, samples = self.algorithm, self.rollout.samples_per_prompt
        if algorithm.compares_by is not None and samples < 2:
            raise ValueError(
                f"{algorithm.compares_by} compares the responses to one prompt with each other, and "
                f"rollout.samples_per_prompt = {samples}: sample at least two"
            )
        if isinstance(algorithm, RFTConfig) and algorithm.kept_per_prompt >= samples:
            raise ValueError(
                f"algorithm.kept_per_prompt = {algorithm.kept_per_prompt} of rollout.samples_per_prompt = {samples} "
                "responses would keep all of them, the worst too: sample more or keep fewer"
            )
        return self

    @model_validator(mode="after")
    def _context_is_long_enough(self) -> Self:
        scratch = self.models.policy.scratch
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if scratch is not None and scratch.context_tokens < longest:
            raise ValueError(
                f"models.policy.scratch.context_tokens = {scratch.context_tokens} is shorter than "
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            )
        return self

    @model_validator(mode="after")
    def _data_for_the_stages(self) -> Self:
        if self.models.policy.scratch is not None and self.data.demonstrations is None:
            raise ValueError(
                "models.policy.scratch needs data.demonstrations to train the tokenizer and the SFT policy"
            )
        anchor = self.scoring.calibration_anchor
        if anchor in ("demonstrations", "responses") and getattr(self.data, anchor) is None:
            raise ValueError(f"scoring.calibration_anchor is {anchor}, but there is no data.{anchor}")
        trained = self.trains_reward_model
        if not self.scoring.rewards:
            raise ValueError("scoring.rewards is empty: name at least one reward")
        if trained and self.models.reward.init == "none":
            raise ValueError("scoring.rewards uses the trained reward model, but models.reward.init is none")
        if trained and self.data.preferences is None and self.rounds.of(1).collect.comparisons == 0:
            raise ValueError(
                "training a reward model needs data.preferences, or comparisons collected in the first round "
                "(rounds.collect.comparisons)"
            )
        if (
            self.algorithm.has_critic
            and self.models.critic.init == "reward"
            and not any(isinstance(r, ModelRewardConfig) for r in self.scoring.rewards)
        ):
            raise ValueError("models.critic.init is reward, but scoring.rewards names no reward model: use policy")
        names = [reward.name for reward in self.scoring.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"scoring.rewards has two rewards of one name: {', '.join(names)}")
        for name in names:
            if name in TAKEN:
                raise ValueError(f"scoring.rewards: the name {name} is {TAKEN[name]}; give it another")
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        if self.trains_reward_model:
            return self._gate_can_tell()
        for number in range(1, self.rounds.count + 1):
            if self.rounds.of(number).guards.heldout_gap is not None:
                raise ValueError(
                    f"round {number}: guards.heldout_gap compares the reward model with one that is trained on other "
                    "comparisons, but scoring.rewards names none with path trained"
                )
            if self.rounds.of(number).collect.comparisons:
                raise ValueError(
                    f"round {number} collects comparisons (rounds.collect), but no reward model is trained on them: "
                    "scoring.rewards names none with path trained"
                )
        return self

    def _gate_can_tell(self) -> Self:
        gate, fraction = self.rounds.gate, self.learner.reward_model.heldout_fraction
        for number in range(2, self.rounds.count + 1):
            comparisons = self.rounds.of(number).collect.comparisons
            if gate.enabled and gate.pairs == "newest" and 0 < comparisons * fraction < gate.min_prompts:
                raise ValueError(
                    f"round {number} collects {comparisons} comparisons and holds out about "
                    f"{comparisons * fraction:.0f} (learner.reward_model.heldout_fraction = {fraction:g}), fewer than "
                    f"rounds.gate.min_prompts = {gate.min_prompts}: no new reward model could ever pass"
                )
        return self

    @model_validator(mode="after")
    def _endpoints_may_be_asked(self) -> Self:
        judges = {f"rounds.labeler of round {n}": self.rounds.of(n).labeler for n in range(1, self.rounds.count + 1)}
        judges["rounds.evaluation.labeler"] = self.rounds.evaluation.labeler
        urls = {f"{where}: url": judge.url for where, judge in judges.items() if isinstance(judge, JudgeConfig)}
        for place, reward in enumerate(self.scoring.rewards):
            if isinstance(reward, HTTPRewardConfig):
                urls[f"scoring.rewards.{place}.url"] = reward.url
                if reward.deadline_s >= self.cluster.deadlines.score_s:
                    raise ValueError(
                        f"scoring.rewards.{place}.deadline_s = {reward.deadline_s:g} is not below "
                        f"cluster.deadlines.score_s = {self.cluster.deadlines.score_s:g}: the run would give up on the "
                        "worker before the worker could say what is wrong with the endpoint"
                    )
        for where, url in urls.items():
            problem = None if url is None else addresses.trouble(url, allowed_hosts=self.cluster.allowed_hosts)
            if problem is not None:
                raise ValueError(f"{where}: {problem}")
        return self

    @model_validator(mode="after")
    def _pretraining_has_data_and_use(self) -> Self:
        wanted = isinstance(self.algorithm, PPOConfig) and self.algorithm.ptx_coefficient > 0
        if wanted and self.data.pretraining is None:
            raise ValueError("algorithm.ptx_coefficient > 0 needs data.pretraining")
        if self.data.pretraining is not None and not wanted:
            raise ValueError(
                "data.pretraining is not read by anything: set algorithm.name = ppo and algorithm.ptx_coefficient > 0, "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _controller_can_steer(self) -> Self:
        algorithm = self.algorithm
        if not isinstance(algorithm, PenalizedBase) or algorithm.kl_controller.kind == "fixed":
            return self
        kind = algorithm.kl_controller.kind
        if algorithm.kl_beta == 0:
            raise ValueError(f"algorithm.kl_controller.kind = {kind} multiplies algorithm.kl_beta, which is 0")
        responses, horizon = self.rollout.responses_per_iteration, algorithm.kl_controller.horizon_episodes
        if kind == "adaptive" and responses >= 5 * horizon:
            raise ValueError(
                f"algorithm.kl_controller.horizon_episodes = {horizon} is too short for {responses} responses an "
                "iteration: one update could take kl_beta to zero"
            )
        return self

    @model_validator(mode="after")
    def _adapter_can_be_published(self) -> Self:
        lora, rollout = self.models.policy.train.lora, self.rollout
        if rollout.publish == "merged":
            return self
        if lora is None:
            raise ValueError(
                "rollout.publish = adapter, but the policy has none: set models.policy.train.lora, or publish = merged"
            )
        if lora.rank > _MAX_SERVED_RANK:
            raise ValueError(
                f"rollout.publish = adapter: vLLM serves adapters up to rank {_MAX_SERVED_RANK}, and "
                f"models.policy.train.lora.rank is {lora.rank}: use publish = merged, or a smaller rank"
            )
        if rollout.tensor_parallel > 1 or rollout.weight_transfer == "collective":
            raise ValueError(
                "rollout.publish = adapter is proven for engines of one rank that load from the object store: use "
                "rollout.tensor_parallel = 1 and weight_transfer = object_store, or publish = merged"
            )
        return self

    @model_validator(mode="after")
    def _backend_can_do_it(self) -> Self:
        scratch, tensor_parallel = self.models.policy.scratch, self.rollout.tensor_parallel
        if scratch is not None and tensor_parallel > scratch.num_kv_heads:
            raise ValueError(
                f"rollout.tensor_parallel = {tensor_parallel} is more than the policy's {scratch.num_kv_heads} "
                "key-value heads: an engine would hold copies of them, and what it holds could not be proven"
            )
        if self.cluster.backend == "cpu" and self.rollout.tensor_parallel > 1:
            raise ValueError("rollout.tensor_parallel > 1 needs cluster.backend = cuda")
        return self
