"""Whether a batch was sampled by the policy that it names: the engine's log-probs against the learner's own.

    w_t = pi_old(y_t) / mu(y_t) = exp(clamp(l_old - l_mu, +-20)),    ESS = (sum w)^2 / (n sum w^2)

In synchronous runs both are the same weights, so every w is one but for rounding; stale weights, another template or
another distribution show here before anything is learned from them. Source: algorithms.md 18.
"""

import math
import statistics
from typing import Literal

import torch
from torch import Tensor

from configs.learner import BatchGuardsConfig
from learner.experience import ResponseBatch
from learner.ops import off_policy
from protocol import metrics as names
from protocol.errors import UntrustedBatchError
from protocol.incidents import Incident
from protocol.messages import NOT_SAMPLED, ScoredBatch, UpdateReport

_CHANCE = 2.0
"""Standard errors that a mean KL may be off; that of a policy that is still its reference falls on either side of 0."""
_ROUNDING = 1e-3
"""Nats per sequence that such a KL may be off for good, where the reference is computed elsewhere."""
_FIGURES = {
    names.SYNC_LOGPROB_GAP: "gap_max",
    names.SYNC_LOGPROB_GAP_MEAN: "gap_mean",
    names.SYNC_RATIO_MAX: "ratio_max",
    names.SYNC_RATIO_P999: "ratio_p999",
    names.SYNC_ESS_FRACTION: "ess",
    names.SYNC_K3_LAG0: "k3_mean",
}


def require_version(batch: ScoredBatch, *, source: Literal["policy", "data"] = "policy") -> None:
    """Refuse a batch that was sampled by another version than the one that the learner published last.

    Args:
        batch: The batch.
        source: `rollout.source`: with `data` the responses must be such as nobody sampled.

    Raises:
        UntrustedBatchError: Naming the first response, its version and its worker.
    """
    version = batch.policy_version
    for rollout in (scored.rollout for scored in batch.rollouts):
        if (rollout.policy_versions == NOT_SAMPLED) != (source == "data"):
            found = "was sampled" if source == "data" else "was read from data"
            text = f"rollout {rollout.key} {found} ({rollout.worker}), but rollout.source = {source}"
            raise UntrustedBatchError(text)
        if source == "data":
            continue
        first, last = rollout.policy_versions
        if not first == last == version:
            sampled = f"version {first}" if first == last else f"versions {first} to {last}"
            text = f"rollout {rollout.key} was sampled by {sampled} on {rollout.worker}, the learner's is {version}"
            raise UntrustedBatchError(text)


def gap_metrics(responses: ResponseBatch, old_logprobs: Tensor) -> dict[str, float]:
    """Compare the log-probs that were recorded when sampling with the learner's, before the first step.

    Args:
        responses: The batch; tokens of other policy versions are left out.
        old_logprobs: [N] the learner's.

    Returns:
        Metric name -> number; nothing if there is no token of this version, or nothing was recorded.
    """
    here = responses.on_policy
    if responses.behavior_logprobs is None or not here.any():
        return {}
    found = off_policy.mismatch(old_logprobs, responses.behavior_logprobs, mask=here)
    numbers = torch.stack([found[figure] for figure in _FIGURES.values()]).tolist()
    return dict(zip(_FIGURES, numbers, strict=True))


def require_trust(
    responses: ResponseBatch, old_logprobs: Tensor, *, found: dict[str, float], guards: BatchGuardsConfig
) -> None:
    """Refuse a batch whose figures are beyond their bounds.

    Args:
        responses: The batch.
        old_logprobs: [N] the learner's log-probs.
        found: What `gap_metrics` says of them.
        guards: The bounds; those that are not set are not looked at.

    Raises:
        UntrustedBatchError: Naming the figure, its bound, its configuration key and the response that is farthest off.
    """
    bounds = (
        (names.SYNC_LOGPROB_GAP_MEAN, "logprob_gap_mean_nats", guards.logprob_gap_mean_nats, 1),
        (names.SYNC_RATIO_P999, "ratio_p999", guards.ratio_p999, 1),
        (names.SYNC_ESS_FRACTION, "ess_fraction", guards.ess_fraction, -1),
    )
    behavior = responses.behavior_logprobs
    for metric, key, bound, sign in bounds:
        if behavior is not None and found and bound is not None and not sign * found[metric] <= sign * bound:
            gaps = torch.where(responses.on_policy, old_logprobs - behavior, 0).abs()
            side = "above" if sign > 0 else "below"
            raise UntrustedBatchError(
                f"{metric} = {found[metric]:.4g} is {side} learner.guards.{key} = {bound:g}: the rollout workers did "
                "not sample from the policy that the learner holds; farthest off is "
                f"{responses.place(int(gaps.argmax()))}"
            )


def found_mismatch(batch: ScoredBatch, *, k3: float, bound: float) -> Incident | None:
    """Describe an engine and a learner that hold one version and are not the same policy.

    Args:
        batch: What the engine sampled.
        k3: Mean k3 between the two, in nats a token, over the tokens of this very version.
        bound: What is no incident.

    Returns:
        The incident, or None.
    """
    if k3 <= bound:
        return None
    return Incident(
        kind="mismatch",
        what=f"engine and learner differ by {k3:.3g} nats a token (k3), more than "
        f"algorithm.correction.alarm_k3 = {bound:g}, on tokens of this very version",
        where="learner",
        cause="other numerics (dtype, kernels), another temperature, or weights that did not arrive",
        action="the run goes on",
        round=batch.round,
        iteration=batch.iteration,
        policy_version=batch.policy_version,
        data={"k3": k3},
    )


def is_kl_negative(report: UpdateReport) -> bool:
    """Say whether the mean k1 per sequence is below zero by more than chance, which no KL can be.

        mean < -max(2 std / sqrt(B), 0.001)

    Args:
        report: Of an iteration.

    Returns:
        Never for responses that the policy did not sample: over those k1 is no estimate of its KL.
    """
    nats = list(report.kl_nats_per_sequence.values())
    if names.OBJECTIVE_KL not in report.metrics or not nats:
        return False
    error = statistics.stdev(nats) / math.sqrt(len(nats)) if len(nats) > 1 else 0.0
    return statistics.fmean(nats) < -max(_CHANCE * error, _ROUNDING)


def found_negative_kl(batch: ScoredBatch, *, kl: float, in_a_row: int, bound: int) -> Incident | None:
    """Describe a KL to the reference that stays negative.

    Args:
        batch: The last one.
        kl: Its mean k1, in nats per sequence.
        in_a_row: Iterations, this one the last, in which it was negative.
        bound: `algorithm.alarm_negative_kl`; there is an incident each time that so many more have passed.

    Returns:
        The incident, or None.
    """
    if not in_a_row or in_a_row % bound:
        return None
    return Incident(
        kind="negative_kl",
        what=f"the KL to the reference was estimated below zero in {in_a_row} iterations in a row, by more than chance "
        f"(algorithm.alarm_negative_kl = {bound}); now it is {kl:.3g} nats a sequence",
        where="learner",
        cause="the responses are no samples of the policy at rollout.temperature: another temperature or distribution, "
        "stale weights, or a reference that is not the one meant",
        action="the run goes on",
        round=batch.round,
        iteration=batch.iteration,
        policy_version=batch.policy_version,
        data={"kl_k1_per_sequence": kl, "iterations_in_a_row": in_a_row},
    )
