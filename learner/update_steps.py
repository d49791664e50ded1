"""The two sides of an update, policy and critic: how each turns a micro-batch into a loss and takes its steps."""

import math

from torch import Tensor

from configs.algorithm import (
    A2CConfig,
    APAConfig,
    AWRConfig,
    KLEstimator,
    PenalizedBase,
    PolicyGradientConfig,
    PPOConfig,
)
from learner.batch import MicroBatch
from learner.experience import TrainBatch, ValueTargets
from learner.ops import a2c, apa, awr, kl, ppo, value
from learner.ops.aggregate import weighted_sum
from learner.ops.masked import moments, whiten
from learner.step_log import StepLog
from learner.training import StepResult, TrainingEngine


class PolicySteps:
    """The policy's steps during one update.

    Args:
        engine: The policy's.
        train: The batch.
        algorithm: Which loss, and what is added to it.
        temperature: The sampling temperature.
        kl_beta: The KL coefficient of this batch.
    """

    learns_ends = False

    def __init__(
        self,
        engine: TrainingEngine,
        train: TrainBatch,
        *,
        algorithm: PolicyGradientConfig,
        temperature: float,
        kl_beta: float,
    ) -> None:
        self.log = StepLog(engine)
        self.minibatch_stds: list[float] = []
        """Of the advantages, one a minibatch; empty where the whole batch is normalised."""
        self._engine, self._train, self._algorithm = engine, train, algorithm
        self._advantages = train.advantages
        self._temperature, self._kl_beta = temperature, kl_beta
        penalized = algorithm if isinstance(algorithm, PenalizedBase) else None
        self._entropy_bonus = 0.0 if penalized is None else penalized.entropy_bonus
        self._penalty: KLEstimator | None = None
        if penalized is not None and penalized.kl_in == "loss":
            self._penalty = penalized.kl_estimator
        # The engine's own log-probs stand in for the old policy where the correction says so.
        self._old_logprobs = train.opinions.old_logprobs
        if algorithm.correction.old_policy == "behavior":
            if train.responses.behavior_logprobs is None:
                raise ValueError("correction.old_policy = behavior needs behaviour log-probs")
            self._old_logprobs = train.responses.behavior_logprobs

    def begin(self, indices: list[int]) -> None:
        """Turn to the minibatch of these responses, before its first micro-batch."""
        if self._algorithm.adv_norm_over == "minibatch":
            self._advantages, std = _whiten_apart(self._train, indices)
            self.minibatch_stds.append(std)

    def learn(self, m: MicroBatch, index: Tensor, *, weights: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient to the step's.

        Args:
            m: Its tensors.
            index: [n] its tokens in the flat vectors.
            weights: [n] of its tokens.
            last: Whether the step has no further micro-batch.
        """
        logprobs, entropies = self._engine.forward(
            m.input_ids,
            m.position_ids,
            m.predict_index,
            m.target_ids,
            temperature=self._temperature,
            with_entropy=self._entropy_bonus > 0,
        )
        self._engine.backward(self._loss(logprobs, entropies, index, weights=weights), last=last)

    def step(self) -> StepResult:
        """Take the step."""
        result = self._engine.step()
        self.log.close_step(result)
        return result

    @property
    def is_far_enough(self) -> bool:
        """Whether the last step's minibatch was so far from the old policy that the policy shall stand still.

        A reduction over ranks, which all ranks must enter.
        """
        algorithm = self._algorithm
        if not isinstance(algorithm, PPOConfig) or algorithm.max_approx_kl is None:
            return False
        return self.log.latest("approx_kl") > algorithm.max_approx_kl

    def _loss(self, logprobs: Tensor, entropies: Tensor | None, index: Tensor, *, weights: Tensor) -> Tensor:
        """Compute the algorithm's loss, the KL penalty and the entropy bonus of a micro-batch."""
        train = self._train
        tensors = {
            "old_logprobs": self._old_logprobs[index],
            "ref_logprobs": train.responses.ref_logprobs[index],
            "advantages": self._advantages[index],
            "weights": weights * train.corrections[index],
        }
        match self._algorithm:
            case PPOConfig() as settings:
                loss, diagnostics = ppo.loss(logprobs, **tensors, settings=settings)
            case APAConfig() as settings:
                loss, diagnostics = apa.loss(logprobs, **tensors, settings=settings)
            case AWRConfig() as settings:
                loss, diagnostics = awr.loss(logprobs, **tensors, settings=settings)
            case A2CConfig() as settings:
                loss, diagnostics = a2c.loss(logprobs, **tensors, settings=settings)
        if self._penalty is not None:
            penalty = kl.penalty(
                logprobs, ref_logprobs=tensors["ref_logprobs"], weights=tensors["weights"], estimator=self._penalty
            )
            loss = loss + self._kl_beta * penalty
            diagnostics["kl_penalty"] = penalty.detach()
        if entropies is not None:
            loss = loss - self._entropy_bonus * weighted_sum(entropies, tensors["weights"])
        ratio_gaps = (logprobs.detach() - tensors["old_logprobs"]).expm1().abs()
        self.log.add(loss, diagnostics, weights=tensors["weights"], watched=ratio_gaps)
        return loss


def _whiten_apart(train: TrainBatch, indices: list[int]) -> tuple[Tensor, float]:
    """Whiten the advantages of one minibatch by its own moments, over all of its ranks and micro-batches.

    Args:
        train: The batch, with advantages as estimated.
        indices: The responses of the minibatch.

    Returns:
        Advantages [N], zero outside the minibatch; and the standard deviation that they were divided by.

    Raises:
        NonFiniteError: If one of them is not finite.
    """
    mask = train.responses.per_token(train.responses.only(indices))
    mean, var = moments(train.advantages, mask)
    whitened = whiten(train.advantages, mask, mean=mean, var=var)
    train.responses.require_finite("normalised advantage", whitened)
    return whitened, math.sqrt(float(var))


class CriticSteps:
    """The critic's steps during one update.

    Args:
        engine: The critic's.
        targets: What it learns.
        settings: Its value clip, and whether the states after the responses are learned too.
    """

    def __init__(self, engine: TrainingEngine, targets: ValueTargets, *, settings: PolicyGradientConfig) -> None:
        self.log = StepLog(engine)
        self.learns_ends = settings.score_at == "after_last_token"
        self._engine, self._targets, self._value_clip = engine, targets, settings.value_clip

    def learn(self, m: MicroBatch, index: Tensor, *, weights: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient to the step's; the arguments are those of `PolicySteps.learn`.

        With `learns_ends`, the states after the micro-batch's responses follow its tokens in `index` and `weights`.
        """
        # A critic values the state before a token, which is where the policy predicts that token.
        states = m.value_index if self.learns_ends else m.predict_index
        values = self._engine.forward(m.input_ids, m.position_ids, states)
        loss, diagnostics = value.loss(
            values,
            old_values=self._targets.old_values[index],
            returns=self._targets.returns[index],
            weights=weights,
            value_clip=self._value_clip,
        )
        self.log.add(loss, diagnostics, weights=weights)
        self._engine.backward(loss, last=last)

    def step(self) -> None:
        """Take the step."""
        self.log.close_step(self._engine.step())
