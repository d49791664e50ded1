"""From a batch and the networks' opinions of it to rewards, advantages and returns, which are constants of an update.

Every rank holds the whole batch and computes the same from it, so moments are global without a reduction.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from configs.algorithm import APAConfig, AWRConfig, PolicyGradientConfig
from learner.experience import Opinions, ResponseBatch, TrainBatch, ValueTargets
from learner.ops import advantages as advantage_ops
from learner.ops import kl, off_policy
from learner.ops.masked import moments, whiten
from learner.ops.rewards import last_token_mask, one_longer, per_token_rewards
from protocol.errors import NonFiniteError, UserError


def estimate(
    responses: ResponseBatch, opinions: Opinions, *, algorithm: PolicyGradientConfig, kl_beta: float
) -> TrainBatch:
    """Compute rewards, advantages and returns.

    Args:
        responses: The whole batch.
        opinions: Of the networks before the first step.
        algorithm: Estimator, discounting, normalisation and correction.
        kl_beta: The KL coefficient of the reward; zero where the KL is in the loss.

    Returns:
        What stays constant during the epochs.

    Raises:
        NonFiniteError: If a reward, an advantage (before or after normalisation) or a return is not finite.
        UserError: If nothing is left to learn from.
    """
    mask, learned = responses.mask, _learned(responses, algorithm=algorithm)
    counted = mask & learned[:, None]
    old, ref = responses.padded(opinions.old_logprobs), responses.padded(responses.ref_logprobs)
    # Where the score comes after the last token, there is no token to be charged: both log-probs are zero.
    places = one_longer(mask) if algorithm.score_at == "after_last_token" else mask
    room = (0, places.shape[1] - mask.shape[1])
    rewards = per_token_rewards(pad(old, room), pad(ref, room), mask=places, scores=responses.scores, kl_beta=kl_beta)
    responses.require_finite("reward", rewards.sum(dim=1))
    credited, reward_std = rewards, 1.0
    if algorithm.whiten_rewards:
        credited, reward_std = _whitened(responses, rewards, places & learned[:, None])
    raw, value_targets = _advantages(responses, opinions, credited, places, learned=learned, algorithm=algorithm)
    responses.require_finite("advantage", raw[mask])
    if value_targets is not None:
        responses.require_finite("return", value_targets.returns)
    mean, var = moments(raw, counted)
    if not var.isfinite():  # in fp32 already at advantages of 1e19: dividing by it would make nothing of all of them
        largest = int(torch.where(counted, raw, 0)[mask].abs().argmax())
        raise NonFiniteError("variance of the advantages", f"{responses.place(largest)}, the largest advantage")
    mode = algorithm.adv_norm if algorithm.adv_norm_over == "batch" else "none"
    normalized = advantage_ops.normalize(raw, counted, mode=mode, mean=mean, var=var)
    responses.require_finite("normalised advantage", normalized[mask])
    return TrainBatch(
        responses=responses,
        opinions=opinions,
        advantages=normalized[mask],
        value_targets=value_targets,
        learned=learned,
        corrections=_corrections(responses, old, algorithm=algorithm),
        kl=kl.kl_per_sequence(old, ref, mask=mask),
        kl_nats=kl.k1(old, ref).sum(dim=1),
        rewards=rewards.sum(dim=1),
        reward_std=reward_std,
        advantage_std=math.sqrt(float(var)),
    )


def _learned(responses: ResponseBatch, *, algorithm: PolicyGradientConfig) -> Tensor:
    """Choose the responses that are learned from: [B]."""
    learned = advantage_ops.choose_learned(
        responses.truncated,
        groups=responses.groups,
        truncated_value=algorithm.truncated_value,
        estimator=algorithm.advantage,
    )
    if not learned.any():
        raise UserError(
            f"algorithm.truncated_value = drop leaves nothing to learn from of {len(learned)} responses",
            where=f"the iteration of rollout {responses.keys[0]}",
            cause=f"{int(responses.truncated.sum())} of them were cut at rollout.max_response_tokens",
            next_step="raise rollout.max_response_tokens, or use truncated_value = terminal with a penalty on length",
        )
    return learned


def _whitened(responses: ResponseBatch, rewards: Tensor, counted: Tensor) -> tuple[Tensor, float]:
    """Bring rewards to variance one about their mean, both over the places that count; and say what was divided by."""
    mean, var = moments(rewards, counted)
    if not var.isfinite():  # as with advantages
        row = int(torch.where(counted, rewards, 0).abs().amax(dim=1).argmax())
        raise NonFiniteError("variance of the rewards", f"rollout {responses.keys[row]}, the largest reward")
    return whiten(rewards, counted, shift_mean=False, mean=mean, var=var), math.sqrt(float(var))


def _advantages(
    responses: ResponseBatch,
    opinions: Opinions,
    rewards: Tensor,
    places: Tensor,
    *,
    learned: Tensor,
    algorithm: PolicyGradientConfig,
) -> tuple[Tensor, ValueTargets | None]:
    """Estimate advantages [B, T] from rewards at their places, and returns where there is a critic to learn them."""
    mask = responses.mask
    if algorithm.advantage != "gae":
        advantages = torch.zeros_like(rewards)
        advantages[learned] = advantage_ops.without_critic(
            rewards[learned].sum(dim=1),
            groups=responses.groups[learned],
            mask=mask[learned],
            estimator=algorithm.advantage,
        )
        return advantages, None
    if opinions.values is None or opinions.final_values is None:
        raise ValueError("generalised advantage estimation needs a critic's values")
    end = advantage_ops.choose_bootstrap_values(
        opinions.final_values, truncated_mask=responses.truncated, truncated_value=algorithm.truncated_value
    )
    has_ends, columns = places.shape != mask.shape, mask.shape[1]
    values = responses.padded(opinions.values)
    if has_ends:
        values = torch.where(last_token_mask(places), opinions.final_values[:, None], pad(values, (0, 1)))
    advantages, returns = advantage_ops.gae(
        rewards,
        values,
        mask=places,
        bootstrap_values=end,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.gae_lambda,
    )
    targets = ValueTargets(old_values=opinions.values, returns=returns[:, :columns][mask])
    if has_ends:
        targets = ValueTargets(
            old_values=torch.cat([opinions.values, opinions.final_values]),
            returns=torch.cat([targets.returns, returns[last_token_mask(places)]]),
        )
    return advantages[:, :columns], targets


def _corrections(responses: ResponseBatch, old_logprobs: Tensor, *, algorithm: PolicyGradientConfig) -> Tensor:
    """Compute what each token's loss is multiplied by: flat [N]."""
    if responses.behavior_logprobs is None:
        if algorithm.correction.weight != "none":
            raise ValueError(f"correction.weight = {algorithm.correction.weight} needs behaviour log-probs")
        return torch.ones_like(responses.ref_logprobs)
    corrections = off_policy.importance_weights(
        old_logprobs,
        responses.padded(responses.behavior_logprobs),
        mask=responses.mask,
        settings=algorithm.correction,
    )[responses.mask]
    if isinstance(algorithm, APAConfig | AWRConfig):
        # Their losses fit targets and have no ratio to complete: the engine's numerics alone are no reason to reweigh,
        # only an older version's samples would be. A run has none of these, so that its configuration refuses a weight.
        return torch.where(responses.on_policy, 1, corrections)
    return corrections
