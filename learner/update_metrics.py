"""The metrics of one update, by the names that every consumer knows."""

import torch
from torch import Tensor

from configs.algorithm import APAConfig, PolicyGradientConfig
from configs.correction import CorrectionConfig
from learner.experience import Opinions, ResponseBatch, TrainBatch
from learner.ops import kl as kl_ops
from learner.ops import off_policy
from learner.ops.advantages import group_std
from learner.ops.value import explained_variance
from learner.step_log import StepLog
from protocol import metrics as names

_POLICY = {
    names.POLICY_LOSS: "loss",
    names.POLICY_GRAD_NORM: "grad_norm",
    names.POLICY_CLIP_FRACTION: "clip_fraction",
    names.POLICY_APPROX_KL: "approx_kl",
    names.POLICY_TARGET_POSITIVE: "target_positive_fraction",
    names.POLICY_RESIDUAL_MEAN: "residual_mean",
    names.POLICY_WEIGHT_CLIP: "weight_clip_fraction",
    names.POLICY_KL_PENALTY: "kl_penalty",
}
_SELECTION = {
    names.POLICY_LOSS: "loss",
    names.POLICY_GRAD_NORM: "grad_norm",
    names.DPO_ACCURACY: "accuracy",
    names.DPO_CHOSEN: "chosen_logprobs_mean",
    names.DPO_REJECTED: "rejected_logprobs_mean",
    names.DPO_CHOSEN_RATIO: "chosen_log_ratio",
    names.DPO_REJECTED_RATIO: "rejected_log_ratio",
    names.RFT_NLL: "nll",
}
_VALUE = {
    names.VALUE_LOSS: "loss",
    names.VALUE_GRAD_NORM: "grad_norm",
    names.VALUE_CLIP_FRACTION: "clip_fraction",
}


def sampling_metrics(responses: ResponseBatch, opinions: Opinions, *, kl_nats: float) -> dict[str, float]:
    """Describe what was sampled, whatever is learned from it.

    Args:
        responses: The batch.
        opinions: Of the policy before the first step.
        kl_nats: The mean over responses of the k1 estimate.

    Returns:
        Metric name -> number.
    """
    means = torch.stack([responses.scores.double().mean(), opinions.entropies.double().mean()]).tolist()
    found = {names.OBJECTIVE_SCORE: means[0], names.POLICY_ENTROPY: means[1]}
    if responses.behavior_logprobs is None:
        # Over responses that others wrote, the mean log-ratio to the reference is no estimate of the policy's KL.
        return found | {names.OBJECTIVE_LOG_RATIO: kl_nats}
    num_responses = len(responses.keys)
    k3 = kl_ops.k3(opinions.old_logprobs, responses.ref_logprobs).double().sum().item() / num_responses
    return found | {
        names.OBJECTIVE_KL: kl_nats,
        names.OBJECTIVE_KL_PER_TOKEN: kl_nats * num_responses / responses.num_tokens,
        names.OBJECTIVE_KL_K3: k3,
        names.OBJECTIVE_KL_CLAMPED: _num_clamped(opinions.old_logprobs, responses.ref_logprobs),
    }


def batch_metrics(train: TrainBatch, *, algorithm: PolicyGradientConfig, kl_beta: float) -> dict[str, float]:
    """Describe a batch before the first step.

    Args:
        train: The batch with its advantages.
        algorithm: Its settings.
        kl_beta: Its KL coefficient, in the reward or in the loss.

    Returns:
        Metric name -> number.
    """
    metrics = sampling_metrics(train.responses, train.opinions, kl_nats=train.kl.nats)
    metrics |= {
        names.OBJECTIVE_REWARD: train.rewards.double().mean().item(),
        names.OBJECTIVE_KL_BETA: kl_beta,
        names.POLICY_ADVANTAGE_STD: train.advantage_std,
    }
    if train.value_targets is not None:
        old_values, returns = train.value_targets.old_values, train.value_targets.returns
        counted = torch.cat([train.responses.per_token(train.learned), train.learned])[: len(returns)]
        metrics[names.VALUE_EXPLAINED_VARIANCE] = explained_variance(old_values, returns, mask=counted)
    if algorithm.truncated_value == "drop":
        metrics[names.POLICY_DROPPED] = float(train.learned.logical_not().sum())
    if isinstance(algorithm, APAConfig):
        # Whatever rewards and advantages are divided by, the KL weight is multiplied by.
        scale = train.reward_std * (1.0 if algorithm.adv_norm == "none" else train.advantage_std)
        if algorithm.advantage == "grpo":
            learned = train.learned
            scale *= group_std(train.rewards[learned], train.responses.groups[learned]).mean().item()
        metrics[names.POLICY_BETA_EFF] = algorithm.apa_lambda * scale
    return metrics


def mismatch_metrics(
    responses: ResponseBatch, old: Tensor, *, correction: CorrectionConfig | None, policy_version: int
) -> dict[str, float]:
    """Describe how far the policy that sampled a batch is from the one that learns.

    Args:
        responses: The batch.
        old: [N] the log-probs of the policy that learns, before the first step.
        correction: What the loss makes of it; None where it has no ratio to correct.
        policy_version: The version that learns.

    Returns:
        Metric name -> number; nothing where nobody recorded with what log-probs it sampled.
    """
    if responses.behavior_logprobs is None:
        return {}
    everywhere = torch.ones_like(responses.on_policy)
    weights = None
    if correction is not None and correction.weight != "none":
        padded = (responses.padded(old), responses.padded(responses.behavior_logprobs))
        weights = off_policy.importance_weights(*padded, mask=responses.mask, settings=correction)[responses.mask]
    found = off_policy.mismatch(old, responses.behavior_logprobs, mask=everywhere, weights=weights)
    metrics = {
        names.SYNC_K3: float(found["k3_mean"]),
        names.SYNC_CLAMPED: _num_clamped(old, responses.behavior_logprobs),
    }
    if weights is not None:
        metrics[names.SYNC_CORRECTED] = float(found["changed_fraction"])
    lags = off_policy.lag_histogram(responses.versions, current=policy_version, mask=everywhere)
    return metrics | {f"{names.SYNC_LAG_PREFIX}{lag}": float(count) for lag, count in lags.items()}


def _num_clamped(logprobs: Tensor, others: Tensor) -> float:
    return float(kl_ops.count_clamped(logprobs, others, mask=torch.ones_like(logprobs, dtype=torch.bool)))


def step_metrics(policy_log: StepLog, critic_log: StepLog | None) -> dict[str, float]:
    """Describe the steps of an update; a reduction over ranks, which all ranks must enter.

    Args:
        policy_log: The policy's steps; none while the critic warms up.
        critic_log: The critic's; None where there is none.

    Returns:
        Metric name -> number; what no step knows is left out.
    """
    metrics: dict[str, float | None] = {names.POLICY_SKIPPED_STEPS: float(policy_log.num_skipped)}
    policy = policy_log.reduce()
    critic = None if critic_log is None else critic_log.reduce()
    if policy is not None:
        metrics |= {metric: policy.mean(name) for metric, name in _POLICY.items()}
        metrics[names.POLICY_LR] = policy.last_learning_rate
        metrics[names.POLICY_FIRST_RATIO_GAP] = policy.first_watched_max
        metrics[names.POLICY_FIRST_CLIP_FRACTION] = policy.first.get("clip_fraction")
        mean, square_mean = policy.mean("weight_mean"), policy.mean("weight_square_mean")
        if mean is not None and square_mean:
            metrics[names.POLICY_WEIGHT_ESS] = mean**2 / square_mean
    if critic is not None and critic_log is not None:
        metrics |= {metric: critic.mean(name) for metric, name in _VALUE.items()}
        metrics[names.VALUE_LR] = critic.last_learning_rate
        metrics[names.VALUE_SKIPPED_STEPS] = float(critic_log.num_skipped)
    return {name: number for name, number in metrics.items() if number is not None}


def selection_metrics(log: StepLog) -> dict[str, float]:
    """Describe the steps of an update that learned whole responses; a reduction over ranks.

    Args:
        log: The policy's steps; there may be none.

    Returns:
        Metric name -> number; what no step knows is left out.
    """
    metrics: dict[str, float | None] = {names.POLICY_SKIPPED_STEPS: float(log.num_skipped)}
    summary = log.reduce()
    if summary is not None:
        metrics |= {metric: summary.mean(name) for metric, name in _SELECTION.items()}
        metrics[names.POLICY_LR] = summary.last_learning_rate
        chosen, rejected = summary.mean("chosen_log_ratio"), summary.mean("rejected_log_ratio")
        if chosen is not None and rejected is not None:
            metrics[names.DPO_MARGIN] = chosen - rejected
            metrics[names.POLICY_FIRST_RATIO_GAP] = summary.first_watched_max
    return {name: number for name, number in metrics.items() if number is not None}
