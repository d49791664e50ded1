"""One iteration of learning: epochs over reshuffled minibatches, each one step of the policy and one of the critic.

What is learned depends on the batch, the settings and the seed alone: not on padding, micro-batches, ranks or ZeRO.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.algorithm import AlgorithmConfig, APAConfig, PPOConfig
from configs.learner import BatchGuardsConfig
from learner.batch import MicroBatch, minibatches
from learner.experience import PassSettings, TrainBatch, estimate, evaluate, flatten, passes
from learner.ops import apa, kl, ppo, value
from learner.ops.aggregate import token_weights
from learner.step_log import StepLog
from learner.training import TrainingEngine
from learner.trust import gap_metrics, require_trust
from learner.update_metrics import batch_metrics, step_metrics
from protocol.messages import ScoredBatch, UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """Everything that an update depends on besides the batch."""

    algorithm: AlgorithmConfig
    passes: PassSettings
    max_response_tokens: int
    run_seed: int
    guards: BatchGuardsConfig | None = None
    """None where the log-probs of engine and learner are of different distributions."""


class Updater:
    """Learns from scored batches with a policy engine and a critic engine.

    Args:
        policy: Over a PolicyModel.
        critic: Over a ScalarModel.
        settings: What to do.
    """

    def __init__(self, *, policy: TrainingEngine, critic: TrainingEngine, settings: UpdateSettings) -> None:
        self.policy = policy
        self.critic = critic
        self.settings = settings
        self.computed: Mapping[str, list[Tensor]] = {}
        """What has been computed from the last batch: name -> one vector a response; for whoever keeps that batch."""
        algorithm = settings.algorithm
        # APA's KL is in its loss, so no coefficient is steered.
        self.controller: kl.KLController | None = None
        if isinstance(algorithm, PPOConfig):
            self.controller = kl.make_controller(algorithm.kl_controller, initial_beta=algorithm.kl_beta)

    @property
    def kl_beta(self) -> float:
        """The KL coefficient of the next batch's reward."""
        return 0.0 if self.controller is None else self.controller.beta

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
        """
        algorithm = self.settings.algorithm
        self.computed = {}
        responses = flatten(batch, device=self.policy.context.device)
        opinions = evaluate(responses, policy=self.policy, critic=self.critic, settings=self.settings.passes)
        self.computed = {
            "old_logprobs": responses.split(opinions.old_logprobs),
            "values": responses.split(opinions.values),
        }
        gaps = gap_metrics(responses, opinions.old_logprobs)
        if self.settings.guards is not None:
            require_trust(responses, opinions.old_logprobs, found=gaps, guards=self.settings.guards)
        train = estimate(responses, opinions, algorithm=algorithm, kl_beta=self.kl_beta)
        self.computed |= {"advantages": responses.split(train.advantages), "returns": responses.split(train.returns)}
        metrics = batch_metrics(train, algorithm=algorithm, kl_beta=self.kl_beta) | gaps
        if self.controller is not None:
            self.controller.update(train.kl)

        train_policy = batch.iteration >= algorithm.critic_warmup_iterations
        policy_log, critic_log = StepLog(self.policy), StepLog(self.critic)
        for epoch in range(algorithm.num_epochs):
            seed = _seed(self.settings.run_seed, batch.round, batch.iteration, epoch)
            for indices in minibatches(len(responses.keys), size=algorithm.minibatch_responses, seed=seed):
                self._step(train, indices, policy_log=policy_log if train_policy else None, critic_log=critic_log)

        for engine in (self.policy, self.critic):
            engine.require_finite_parameters()
        metrics |= step_metrics(policy_log, critic_log)
        return UpdateReport(
            metrics=metrics,
            num_steps=(policy_log if train_policy else critic_log).num_applied,
            num_skipped_steps=policy_log.num_skipped + critic_log.num_skipped,
            kl_nats_per_sequence=dict(zip(responses.keys, train.kl_nats.tolist(), strict=True)),
        )

    def _step(self, train: TrainBatch, indices: list[int], *, policy_log: StepLog | None, critic_log: StepLog) -> None:
        weights = self._weights(train, indices)
        own = list(passes(train.responses, indices, settings=self.settings.passes, engine=self.policy))
        for number, (micro_batch, index, _) in enumerate(own):
            last = number == len(own) - 1
            if policy_log is not None:
                loss = self._policy_loss(train, micro_batch, index, weights=weights[index], log=policy_log)
                self.policy.backward(loss, last=last)
            loss = self._value_loss(train, micro_batch, index, weights=weights[index], log=critic_log)
            self.critic.backward(loss, last=last)
        if policy_log is not None:
            policy_log.close_step(self.policy.step())
        critic_log.close_step(self.critic.step())

    def _weights(self, train: TrainBatch, indices: list[int]) -> Tensor:
        """Weigh the tokens of one minibatch: flat [N] over the whole batch, zero elsewhere."""
        mask = torch.zeros_like(train.responses.mask)
        mask[indices] = train.responses.mask[indices]
        weights = token_weights(
            mask, mode=self.settings.algorithm.aggregation, constant=self.settings.max_response_tokens
        )
        return weights[train.responses.mask]

    def _policy_loss(self, train: TrainBatch, m: MicroBatch, index: Tensor, *, weights: Tensor, log: StepLog) -> Tensor:
        logprobs, _ = self.policy.forward(
            m.input_ids,
            m.position_ids,
            m.predict_index,
            m.target_ids,
            temperature=self.settings.passes.temperature,
        )
        tensors = {
            "old_logprobs": train.opinions.old_logprobs[index],
            "ref_logprobs": train.responses.ref_logprobs[index],
            "advantages": train.advantages[index],
            "weights": weights,
        }
        match self.settings.algorithm:
            case PPOConfig() as settings:
                loss, diagnostics = ppo.loss(logprobs, **tensors, settings=settings)
            case APAConfig() as settings:
                loss, diagnostics = apa.loss(logprobs, **tensors, settings=settings)
        ratio_gaps = (logprobs.detach() - tensors["old_logprobs"]).expm1().abs()
        log.add(loss, diagnostics, weights=weights, watched=ratio_gaps)
        return loss

    def _value_loss(self, train: TrainBatch, m: MicroBatch, index: Tensor, *, weights: Tensor, log: StepLog) -> Tensor:
        # A critic values the state before a token, which is where the policy predicts that token.
        values = self.critic.forward(m.input_ids, m.position_ids, m.predict_index)
        loss, diagnostics = value.loss(
            values,
            old_values=train.opinions.values[index],
            returns=train.returns[index],
            weights=weights,
            value_clip=self.settings.algorithm.value_clip,
        )
        log.add(loss, diagnostics, weights=weights)
        return loss


def _seed(*parts: int) -> int:
    """Derive a seed for one shuffle."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
