"""Estimates of KL(policy || reference) from the policy's own samples, and the controllers of its coefficient.

With lr = log policy - log reference on tokens that the policy sampled, k1 = lr and k3 have the KL as expectation
and k2 agrees to second order. Their gradients differ from their values: k1 belongs in the reward only (as a loss
its expected gradient is zero), k2 (or k3+, with its gradient) in a loss only, and k3 is for watching. The controllers
take the KL per sequence, in a type of its own, because a mean per token would be smaller by the length of a response
and move the coefficient the wrong way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.kl import KLControllerConfig, KLEstimator
from learner.ops.aggregate import weighted_sum, where_weighted
from learner.ops.masked import check_alike, masked_sum

MAX_EXPONENT = 20.0
"""Log-ratios are clamped to plus or minus this, in nats, before they are exponentiated."""
MAX_RELATIVE_ERROR = 0.2
"""The adaptive controller takes no error for larger than this fraction of its target."""
TOLERATED_RATIO = 1.5
"""The doubling controller leaves the coefficient alone while KL and target are within this factor of each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceKL:
    """The KL of a batch: the mean over responses of the k1 estimate summed over a response's tokens."""

    nats: float
    """Nats per sequence; a sampling error can make it negative, a lasting negative value is a fault."""
    num_sequences: int
    """Responses that the mean was taken over."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the KL by the log-ratio itself.

        k1 = lr,  lr = log pi - log ref

    Source: Schulman, "Approximating KL Divergence" (2020).

    Args:
        logprobs: Any shape, nats; the policy's, of tokens that it sampled.
        ref_logprobs: The same shape, nats; the reference's, of the same tokens.

    Returns:
        Nats per token. Unbiased in value; as a penalty in the reward unbiased in gradient too.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the KL by half the squared log-ratio.

        k2 = lr^2 / 2

    Source: Schulman, "Approximating KL Divergence" (2020).

    Args:
        logprobs: Any shape, nats; the policy's, of tokens that it sampled.
        ref_logprobs: The same shape, nats; the reference's, of the same tokens.

    Returns:
        Nats per token. Biased in value, but as a loss its expected gradient is that of the KL.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the KL by the log-ratio with a control variate.

        k3 = exp(-lr) - 1 + lr        (the exponent clamped to +-20)

    Source: Schulman, "Approximating KL Divergence" (2020). With the sign of lr swapped in the exponential it would
    estimate chi^2 - KL.

    Args:
        logprobs: Any shape, nats; the policy's, of tokens that it sampled.
        ref_logprobs: The same shape, nats; the reference's, of the same tokens.

    Returns:
        Nats per token. Unbiased in value and never negative (below the clamp); not for a reward or a loss.
    """
    log_ratio = logprobs - ref_logprobs
    return torch.expm1((-log_ratio).clamp(-MAX_EXPONENT, MAX_EXPONENT)) + log_ratio


def k3_plus(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate the KL by k3, with the gradient of k2.

        value k3,  gradient d k2 = lr d lr

    Source: verl, core_algos.py:1853-1864 ("straight-through").

    Args:
        logprobs: Any shape, nats; the policy's, of tokens that it sampled.
        ref_logprobs: The same shape, nats; the reference's, of the same tokens.

    Returns:
        Nats per token. Unbiased in value, and as a loss its expected gradient is that of the KL; not for a reward,
        where the value alone would count.
    """
    squared = k2(logprobs, ref_logprobs)
    return squared - squared.detach() + k3(logprobs, ref_logprobs).detach()


def exact(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the KL of the next-token distributions at visited states, over the whole vocabulary.

        KL(s) = sum_v pi(v | s) (log pi(v | s) - log ref(v | s))

    Summed over the states of a response and averaged over responses, it estimates the same KL per sequence as k1, with
    less variance: only which states are visited is left to chance.

    Args:
        logits: `[..., V]`; the policy's at the visited states.
        ref_logits: The same shape; the reference's at the same states.
        temperature: At which the tokens were sampled.

    Returns:
        `[...]`, nats, never below zero but for rounding; with gradient.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    log_ratio = logprobs - torch.log_softmax(ref_logits / temperature, dim=-1)
    # A token that the policy cannot produce counts zero, whatever the reference thinks of it.
    return torch.where(logprobs > -torch.inf, logprobs.exp() * log_ratio, 0).sum(dim=-1)


def penalty(logprobs: Tensor, *, ref_logprobs: Tensor, weights: Tensor, estimator: KLEstimator) -> Tensor:
    """Aggregate the KL as a term of the loss.

        sum_t k_t W_t

    With k2 and k3+ the expected gradient is that of KL(pi || ref), with k3 that of KL(ref || pi).

    Args:
        logprobs: `[B, T]` or `[N]`, nats; the policy's now.
        ref_logprobs: The same shape, nats; the frozen reference's.
        weights: The same shape; from `aggregate.token_weights`.
        estimator: `algorithm.kl_estimator`.

    Returns:
        A scalar, nats per token where the weights sum to 1; only `logprobs` gets a gradient.

    Raises:
        ValueError: If shapes or dtypes differ, or for k1, whose expected gradient is zero.
    """
    check_alike(logprobs=logprobs, ref_logprobs=ref_logprobs, weights=weights)
    if estimator == "k1":
        raise ValueError("k1 as a loss has an expected gradient of zero: use k2")
    log_ratio = where_weighted(logprobs - ref_logprobs.detach(), weights)
    estimate = {"k2": k2, "k3": k3, "k3+": k3_plus}[estimator]
    return weighted_sum(estimate(log_ratio, torch.zeros_like(log_ratio)), weights)


def count_clamped(logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor) -> Tensor:
    """Count the tokens whose log-ratio is too large for the exponential.

    Args:
        logprobs: `[B, T]` or `[N]`, nats.
        ref_logprobs: The same shape, nats.
        mask: The same shape, bool; True at response tokens.

    Returns:
        A scalar; anything but zero deserves a look.
    """
    beyond = (logprobs - ref_logprobs).abs() > MAX_EXPONENT
    return masked_sum(beyond.long(), mask)


def kl_per_sequence(logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor) -> SequenceKL:
    """Average over responses the k1 estimate summed over each response.

        (1/B) sum_i sum_t m_it k1_it

    Source: openai/lm-human-preferences, train_policy.py:220-221.

    Args:
        logprobs: `[B, T]`, nats; the policy's when it sampled.
        ref_logprobs: `[B, T]`, nats.
        mask: `[B, T]`, bool; True at response tokens. Rows without any are not counted.

    Returns:
        The mean and the number of responses in it.

    Raises:
        ValueError: If shapes or dtypes differ, or if there is no response.
    """
    check_alike(logprobs=logprobs, ref_logprobs=ref_logprobs, ranks=(2,))
    total = masked_sum(k1(logprobs, ref_logprobs).double(), mask)
    num_sequences = int(mask.any(dim=1).sum())
    if num_sequences == 0:
        raise ValueError("no row has a response token, so the KL per sequence is undefined")
    return SequenceKL(nats=total.item() / num_sequences, num_sequences=num_sequences)


def pool(parts: Sequence[SequenceKL]) -> SequenceKL:
    """Join the KL of parts of a batch (ranks, micro-batches) into that of the batch.

        sum_j B_j KL_j / sum_j B_j

    Args:
        parts: One or more.

    Returns:
        The KL over all sequences.

    Raises:
        ValueError: If there are no parts.
    """
    num_sequences = sum(part.num_sequences for part in parts)
    if num_sequences == 0:
        raise ValueError("no parts to pool")
    nats = math.fsum(part.nats * part.num_sequences for part in parts) / num_sequences
    return SequenceKL(nats=nats, num_sequences=num_sequences)


class FixedKLController:
    """Keeps the KL coefficient where it is."""

    def __init__(self, config: KLControllerConfig, *, initial_beta: float) -> None:
        self.config = config
        self.load_state_dict({"beta": initial_beta})

    def update(self, kl: SequenceKL) -> None:
        """Take notice of the KL of an iteration; to be called once an iteration, after its rewards.

        Args:
            kl: The KL of the batch that was just scored.

        Raises:
            TypeError: If given anything but a `SequenceKL`, such as the mean per token.
            ValueError: If the KL is not finite or comes from no sequence.
        """
        if not isinstance(kl, SequenceKL):
            raise TypeError(f"the KL controller takes a SequenceKL (nats per sequence), got {type(kl).__name__}")
        if not math.isfinite(kl.nats) or kl.num_sequences < 1:
            raise ValueError(f"the KL controller needs a finite KL of at least one sequence, got {kl}")

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must keep: the coefficient, in units of the score per nat."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the coefficient of a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the coefficient is missing, negative or not finite.
        """
        beta = float(state.get("beta", math.nan))
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"the KL coefficient must be finite and not negative, got {beta}")
        self.beta = beta


class FactorKLController(FixedKLController):
    """A controller that changes the coefficient by factors."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the coefficient of a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the coefficient is missing, not positive (a factor would never move it) or not finite.
        """
        super().load_state_dict(state)
        if self.beta == 0:
            raise ValueError("an adaptive KL coefficient must start above zero: it changes by factors")


class AdaptiveKLController(FactorKLController):
    """Moves the KL coefficient until the KL per sequence is at its target."""

    def update(self, kl: SequenceKL) -> None:
        """Raise the coefficient if the KL is above its target, and lower it if below.

            beta <- beta (1 + e n / horizon),  e = clip(KL / target - 1, -0.2, 0.2)

        Source: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), in the form
        of openai/lm-human-preferences, train_policy.py:115-124.

        Args:
            kl: The KL of the batch that was just scored; n is its number of sequences.

        Raises:
            TypeError: If given anything but a `SequenceKL`, such as the mean per token.
            ValueError: If the KL is not finite, or if the batch is so large that the coefficient could turn negative.
        """
        super().update(kl)
        step = kl.num_sequences / self.config.horizon_episodes
        if MAX_RELATIVE_ERROR * step >= 1:
            horizon = self.config.horizon_episodes
            raise ValueError(f"the KL horizon must exceed a fifth of the batch, {horizon=} and {kl.num_sequences=}")
        error = kl.nats / self.config.target_nats_per_sequence - 1
        self.beta *= 1 + min(max(error, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR) * step


class DoublingKLController(FactorKLController):
    """Halves or doubles the KL coefficient where the KL per sequence is far from its target."""

    def update(self, kl: SequenceKL) -> None:
        """Double the coefficient if the KL is well above its target, and halve it if well below.

            beta <- beta / 2 if KL < target / 1.5;  2 beta if KL > 1.5 target

        Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), section 4.

        Args:
            kl: The KL of the batch that was just scored.

        Raises:
            TypeError: If given anything but a `SequenceKL`, such as the mean per token.
            ValueError: If the KL is not finite.
        """
        super().update(kl)
        target = self.config.target_nats_per_sequence
        if kl.nats < target / TOLERATED_RATIO:
            self.beta /= 2
        elif kl.nats > target * TOLERATED_RATIO:
            self.beta *= 2


KLController = FixedKLController | AdaptiveKLController | DoublingKLController


def make_controller(config: KLControllerConfig, *, initial_beta: float) -> KLController:
    """Build the controller that the configuration names.

    Args:
        config: `algorithm.kl_controller`.
        initial_beta: `algorithm.kl_beta`, in units of the score per nat.

    Returns:
        The controller; `beta` is the coefficient to use now.

    Raises:
        ValueError: If the coefficient is not finite, negative, or zero for a controller that changes it.
    """
    kinds = {"fixed": FixedKLController, "adaptive": AdaptiveKLController, "doubling": DoublingKLController}
    return kinds[config.kind](config, initial_beta=initial_beta)
