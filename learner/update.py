"""One iteration of learning: epochs over shuffled minibatches, each one step of the policy and one of the critic.

What is learned depends on the batch, the settings and the seed alone: not on padding, micro-batches, ranks or ZeRO.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import fmean

import torch
from torch import Tensor

from configs.algorithm import APAConfig, PenalizedBase, PolicyGradientConfig, PPOConfig
from configs.learner import BatchGuardsConfig
from learner.batch import TokenSequence, even_minibatches, shuffle_seed
from learner.estimates import estimate
from learner.experience import PassSettings, TrainBatch, evaluate, flatten, passes
from learner.ops import kl
from learner.ops.aggregate import token_weights
from learner.ops.rewards import last_token_mask, one_longer
from learner.pretraining import PretrainingSteps
from learner.training import TrainingEngine
from learner.trust import gap_metrics, require_trust
from learner.update_metrics import batch_metrics, mismatch_metrics, step_metrics
from learner.update_steps import CriticSteps, PolicySteps
from protocol import metrics as names
from protocol.messages import ScoredBatch, UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """Everything that an update depends on besides the batch."""

    algorithm: PolicyGradientConfig
    passes: PassSettings
    max_response_tokens: int
    run_seed: int
    guards: BatchGuardsConfig | None = None
    """None where the log-probs of engine and learner are of different distributions."""


class Updater:
    """Learns from scored batches by a policy gradient, with a policy engine and, where that needs one, a critic engine.

    Args:
        policy: Over a PolicyModel.
        critic: Over a ScalarModel; None exactly where the algorithm has no critic.
        settings: What to do.
        texts: Pretraining data of PPO-ptx (learner.pretraining.load_texts); none without it.

    Raises:
        ValueError: If there is a critic too many or too few.
    """

    def __init__(
        self,
        *,
        policy: TrainingEngine,
        critic: TrainingEngine | None,
        settings: UpdateSettings,
        texts: Sequence[TokenSequence] = (),
    ) -> None:
        algorithm = settings.algorithm
        if algorithm.has_critic != (critic is not None):
            raise ValueError(f"advantage = {algorithm.advantage} {'needs a' if critic is None else 'has no'} critic")
        self.policy = policy
        self.critic = critic
        self.settings = settings
        self.texts = texts
        self.memory = None
        """Policy gradients learn from the newest batch alone."""
        self.computed: Mapping[str, list[Tensor]] = {}
        """What has been computed from the last batch: name -> one vector a response; for whoever keeps that batch."""
        # APA's KL is in its own loss, so no coefficient is steered.
        self.controller: kl.KLController | None = None
        if isinstance(algorithm, PenalizedBase):
            self.controller = kl.make_controller(algorithm.kl_controller, initial_beta=algorithm.kl_beta)
        self._penalty = algorithm if isinstance(algorithm, PenalizedBase) else None

    @property
    def engines(self) -> dict[str, TrainingEngine]:
        """The engines by name, as a checkpoint keeps them."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    @property
    def kl_beta(self) -> float:
        """The KL coefficient of the next batch."""
        return 0.0 if self.controller is None else self.controller.beta

    @property
    def reward_kl_beta(self) -> float:
        """The KL coefficient of the next batch's reward."""
        return 0.0 if self._penalty is None or self._penalty.kl_in == "loss" else self.kl_beta

    def update(self, batch: ScoredBatch) -> UpdateReport:
        """Learn from a batch. All ranks call this with the same batch.

        Args:
            batch: In key order.

        Returns:
            What happened, the same on all ranks.

        Raises:
            NonFiniteError: If a score, log-prob, value, reward, advantage or return is not finite, naming the rollout;
                a loss or gradient, unless it is skipped; or a parameter, after the last step.
            UntrustedBatchError: If the log-probs show that another policy has sampled the batch.
            UserError: If responses cut at the length limit are dropped, and nothing is left.
        """
        algorithm = self.settings.algorithm
        self.computed = {}
        responses = flatten(batch, device=self.policy.context.device)
        opinions = evaluate(responses, policy=self.policy, critic=self.critic, settings=self.settings.passes)
        self.computed = {"old_logprobs": responses.split(opinions.old_logprobs)}
        if opinions.values is not None:
            self.computed |= {"values": responses.split(opinions.values)}
        gaps = gap_metrics(responses, opinions.old_logprobs)
        if self.settings.guards is not None:
            require_trust(responses, opinions.old_logprobs, found=gaps, guards=self.settings.guards)
        beta = self.kl_beta
        train = estimate(responses, opinions, algorithm=algorithm, kl_beta=self.reward_kl_beta)
        self.computed |= {"advantages": responses.split(train.advantages)}
        if train.value_targets is not None:
            self.computed |= {"returns": responses.split(train.value_targets.returns[: responses.num_tokens])}
        metrics = batch_metrics(train, algorithm=algorithm, kl_beta=beta) | gaps
        metrics |= mismatch_metrics(
            responses, opinions.old_logprobs, correction=algorithm.correction, policy_version=batch.policy_version
        )
        policy = self._policy_steps(train, kl_beta=beta)
        critic = None
        if self.critic is not None and train.value_targets is not None:
            critic = CriticSteps(self.critic, train.value_targets, settings=algorithm)
        trains_policy = batch.iteration >= algorithm.warmup_iterations
        # The KL of a policy that stands still answers to nothing; that of short responses alone would be too small.
        if self.controller is not None and trains_policy:
            self.controller.update(train.kl)
        rehearsal = self._rehearsal(batch) if trains_policy else None
        is_far_enough = False
        for indices in self._minibatches(batch, train.learned.nonzero()[:, 0].tolist()):
            if rehearsal is not None and not rehearsal.log.num_steps:
                metrics |= self._gradient_ratio(train, indices, kl_beta=beta, probe=self._rehearsal(batch))
            moves_policy = trains_policy and not is_far_enough
            self._step(train, indices, policy=policy if moves_policy else None, critic=critic, rehearsal=rehearsal)
            is_far_enough = is_far_enough or (moves_policy and policy.is_far_enough)

        for engine in self.engines.values():
            engine.require_finite_parameters()
        if rehearsal is not None and (summary := rehearsal.log.reduce()) is not None:
            metrics |= {} if (nll := summary.mean("nll")) is None else {names.POLICY_PTX_NLL: nll}
        logs = [policy.log] if critic is None else [policy.log, critic.log]
        metrics |= step_metrics(policy.log, None if critic is None else critic.log)
        if isinstance(algorithm, APAConfig) and policy.minibatch_stds:  # what each step's advantages were divided by
            metrics[names.POLICY_BETA_EFF] = algorithm.apa_lambda * train.reward_std * fmean(policy.minibatch_stds)
        if isinstance(algorithm, PPOConfig) and algorithm.max_approx_kl is not None:
            metrics[names.POLICY_STOPPED_EARLY] = float(is_far_enough)
        return UpdateReport(
            metrics=metrics,
            num_steps=logs[0 if trains_policy else -1].num_applied,
            num_skipped_steps=sum(log.num_skipped for log in logs),
            kl_nats_per_sequence=dict(zip(responses.keys, train.kl_nats.tolist(), strict=True)),
        )

    def _minibatches(self, batch: ScoredBatch, learned: list[int]) -> Iterator[list[int]]:
        """Choose each step's responses: reshuffled passes, or a single one that takes each minibatch several times."""
        algorithm = self.settings.algorithm
        passes, times = (1, algorithm.num_epochs) if algorithm.repeat_minibatch else (algorithm.num_epochs, 1)
        for epoch in range(passes):
            seed = shuffle_seed(self.settings.run_seed, batch.round, batch.iteration, epoch)
            for places in even_minibatches(len(learned), most=algorithm.minibatch_responses, seed=seed):
                yield from repeat([learned[place] for place in places], times)

    def _step(
        self,
        train: TrainBatch,
        indices: list[int],
        *,
        policy: PolicySteps | None,
        critic: CriticSteps | None,
        rehearsal: PretrainingSteps | None,
    ) -> None:
        """Take one step of each side that learns; the pretraining gradient is part of the policy's."""
        if policy is not None and rehearsal is not None:
            rehearsal.learn(rehearsal.choose(), last=False)
        self._learn(train, indices, policy=policy, critic=critic)
        if policy is not None:
            result = policy.step()
            if rehearsal is not None:
                rehearsal.log.close_step(result)
        if critic is not None:
            critic.step()

    def _learn(
        self, train: TrainBatch, indices: list[int], *, policy: PolicySteps | None, critic: CriticSteps | None
    ) -> None:
        """Add the gradient of one minibatch to the step of each side that learns."""
        sides = [side for side in (policy, critic) if side is not None]
        if not sides:
            return
        if policy is not None:
            policy.begin(indices)
        weighted = [(side, self._weights(train, indices, with_ends=side.learns_ends)) for side in sides]
        own = list(passes(train.responses, indices, settings=self.settings.passes, engine=self.policy))
        for number, (micro_batch, index, group) in enumerate(own):
            ends = train.responses.num_tokens + index.new_tensor(group)
            for side, weights in weighted:
                learned = torch.cat([index, ends]) if side.learns_ends else index
                side.learn(micro_batch, learned, weights=weights[learned], last=number == len(own) - 1)

    def _policy_steps(self, train: TrainBatch, *, kl_beta: float) -> PolicySteps:
        settings = self.settings
        return PolicySteps(
            self.policy, train, algorithm=settings.algorithm, temperature=settings.passes.temperature, kl_beta=kl_beta
        )

    def _rehearsal(self, batch: ScoredBatch) -> PretrainingSteps | None:
        """Prepare the pretraining side of an update; the same texts in the same order for the same batch."""
        algorithm = self.settings.algorithm
        if not isinstance(algorithm, PPOConfig) or algorithm.ptx_coefficient == 0:
            return None
        return PretrainingSteps(
            self.policy,
            self.texts,
            settings=self.settings.passes,
            coefficient=algorithm.ptx_coefficient,
            size=algorithm.ptx_texts,
            seed=shuffle_seed(self.settings.run_seed, batch.round, batch.iteration, algorithm.num_epochs),
        )

    def _gradient_ratio(
        self, train: TrainBatch, indices: list[int], *, kl_beta: float, probe: PretrainingSteps | None
    ) -> dict[str, float]:
        """Measure the two gradients of a step apart, at the price of one more pass over both."""
        if probe is None:
            return {}
        self._learn(train, indices, policy=self._policy_steps(train, kl_beta=kl_beta), critic=None)
        policy_norm = self.policy.measure()
        probe.learn(probe.choose(), last=True)
        ratio = self.policy.measure() / policy_norm if policy_norm else math.inf
        return {names.POLICY_PTX_RATIO: ratio} if math.isfinite(ratio) else {}

    def _weights(self, train: TrainBatch, indices: list[int], *, with_ends: bool) -> Tensor:
        """Weigh the tokens of one minibatch: flat [N] over the whole batch, zero elsewhere; with the ends [N + B]."""
        responses = train.responses
        places = one_longer(responses.mask) if with_ends else responses.mask
        weights = token_weights(
            places & responses.only(indices)[:, None],
            mode=self.settings.algorithm.aggregation,
            constant=self.settings.max_response_tokens,
        )
        flat = weights[:, : responses.mask.shape[1]][responses.mask]
        return torch.cat([flat, weights[last_token_mask(places)]]) if with_ends else flat
