"""A batch is learned from only if the learner's own log-probs say that this policy sampled it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from configs.learner import BatchGuardsConfig
from learner.experience import flatten
from learner.trust import found_negative_kl, gap_metrics, is_kl_negative, require_trust, require_version
from protocol.errors import UntrustedBatchError
from protocol.messages import PolicyVersions, RolloutKey, ScoredBatch, UpdateReport
from tests.learner_batches import scored_batch

HERE = PolicyVersions(3, 3)


def batch_of(*gaps: list[float], versions: PolicyVersions = HERE) -> tuple[ScoredBatch, torch.Tensor]:
    """Make responses whose recorded log-probs are -2, and learner's log-probs with these gaps to them."""
    rollouts = [
        replace(
            scored,
            ref_logprobs=np.zeros(len(gap), dtype=np.float32),
            rollout=replace(
                scored.rollout,
                response_ids=np.ones(len(gap), dtype=np.int32),
                behavior_logprobs=np.full(len(gap), -2.0, dtype=np.float32),
                policy_versions=versions,
            ),
        )
        for scored, gap in zip(scored_batch(len(gaps)).rollouts, gaps, strict=True)
    ]
    return ScoredBatch(round=1, iteration=0, policy_version=3, rollouts=tuple(rollouts)), torch.tensor(
        [-2.0 + gap for part in gaps for gap in part]
    )


def figures(*gaps: list[float]) -> dict[str, float]:
    batch, old = batch_of(*gaps)
    return gap_metrics(flatten(batch, device=torch.device("cpu")), old)


def test_the_figures_are_those_of_the_equations() -> None:
    found = figures([math.log(2.0), 0.0], [-math.log(2.0), 0.0])
    assert found["sync/logprob_gap_max"] == pytest.approx(0.693147, abs=1e-5)
    assert found["sync/logprob_gap_mean"] == pytest.approx(0.346574, abs=1e-5)
    assert found["sync/ratio_max"] == pytest.approx(2.0, abs=1e-5)
    assert found["sync/ratio_p999"] == pytest.approx(2.0, abs=1e-5)
    # Weights 2, 1, 1/2 and 1: their sum is 4.5, that of their squares 6.25.
    assert found["sync/ess_fraction"] == pytest.approx(20.25 / (4 * 6.25), abs=1e-5)


def test_the_tail_leaves_out_one_token_of_a_thousand() -> None:
    found = figures([0.0] * 1998 + [math.log(3.0)] + [math.log(50.0)])
    assert found["sync/ratio_max"] == pytest.approx(50.0, rel=1e-4)
    assert found["sync/ratio_p999"] == pytest.approx(1.0, rel=1e-4)
    assert figures([0.0] * 1998 + [math.log(3.0)] * 3)["sync/ratio_p999"] == pytest.approx(3.0, rel=1e-4)


def test_a_ratio_beyond_all_bounds_is_clamped_and_not_infinite() -> None:
    assert figures([0.0, 1000.0])["sync/ratio_max"] == pytest.approx(math.exp(20.0))


def test_i21_tokens_of_another_version_are_not_compared() -> None:
    batch, old = batch_of([5.0, 5.0], versions=PolicyVersions(2, 3))
    responses = flatten(batch, device=torch.device("cpu"))
    found = gap_metrics(responses, old)
    assert found == {}
    require_trust(responses, old, found=found, guards=BatchGuardsConfig())


def refusal(guards: dict[str, Any], *gaps: list[float]) -> str | None:
    batch, old = batch_of(*gaps)
    responses = flatten(batch, device=torch.device("cpu"))
    nothing = {"logprob_gap_mean_nats": None, "ratio_p999": None, "ess_fraction": None}
    try:
        require_trust(responses, old, found=gap_metrics(responses, old), guards=BatchGuardsConfig(**nothing | guards))
    except UntrustedBatchError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("guards", "calm", "bad", "says"),
    [
        ({"logprob_gap_mean_nats": 0.1}, 0.09, 0.12, "sync/logprob_gap_mean = 0.12 is above learner.guards.logprob"),
        ({"ratio_p999": 4.0}, math.log(3.9), math.log(4.1), "sync/ratio_p999 = 4.1 is above learner.guards.ratio_p999"),
    ],
)
def test_each_bound_refuses_beyond_itself(guards: dict[str, float], calm: float, bad: float, says: str) -> None:
    assert refusal(guards, [calm, calm]) is None
    assert says in str(refusal(guards, [bad, bad]))
    assert refusal({}, [bad, bad]) is None


def test_few_effective_samples_are_refused_by_name_of_the_farthest() -> None:
    text = refusal({"ess_fraction": 0.5}, [0.0] * 5, [0.0, 0.0, 5.0])
    assert text is not None
    assert "below learner.guards.ess_fraction = 0.5" in text
    assert text.endswith("farthest off is token 2 of rollout r1/i0/p0001#0")


@pytest.mark.parametrize("versions", [PolicyVersions(2, 2), PolicyVersions(2, 3), PolicyVersions(4, 4)])
def test_a_batch_of_another_version_is_refused(versions: PolicyVersions) -> None:
    batch = scored_batch()
    require_version(batch)
    stale = replace(batch.rollouts[5].rollout, policy_versions=versions)
    rollouts = (*batch.rollouts[:5], replace(batch.rollouts[5], rollout=stale), *batch.rollouts[6:])
    with pytest.raises(UntrustedBatchError, match=r"r1/i0/p0005#0 was sampled by version.* on rollout-0, .* is 3"):
        require_version(replace(batch, rollouts=rollouts))


def report_of(*nats: float, metrics: dict[str, float] | None = None) -> UpdateReport:
    found = {RolloutKey(1, 0, f"p{number}", 0): value for number, value in enumerate(nats)}
    mean = {"objective/kl_k1_per_sequence": sum(nats) / len(nats)} if metrics is None else metrics
    return UpdateReport(metrics=mean, num_steps=1, num_skipped_steps=0, kl_nats_per_sequence=found)


@pytest.mark.parametrize(
    ("nats", "is_negative"),
    [
        ((-1.0,), True),
        ((1.0, 2.0, 3.0), False),
        # Mean -2, standard deviation 1, standard error 1 / sqrt(3): beyond twice that.
        ((-1.0, -2.0, -3.0), True),
        # Mean -1, standard deviation 1, standard error 0.577: within twice that.
        ((0.0, -1.0, -2.0), False),
        ((-2e-3,) * 4, True),
        ((-5e-4,) * 4, False),
    ],
)
def test_a_kl_is_negative_only_beyond_chance_and_rounding(nats: tuple[float, ...], is_negative: bool) -> None:
    assert is_kl_negative(report_of(*nats)) is is_negative


def test_responses_that_nobody_sampled_have_no_kl() -> None:
    assert not is_kl_negative(report_of(-5.0, -5.0, metrics={"objective/log_ratio_per_sequence": -5.0}))


def test_a_negative_kl_is_an_incident_each_time_the_bound_is_full() -> None:
    batch = scored_batch(iteration=4)
    found = [found_negative_kl(batch, kl=-0.25, in_a_row=count, bound=3) for count in range(8)]
    assert [number for number, incident in enumerate(found) if incident is not None] == [3, 6]
    incident = found[3]
    assert incident is not None
    assert (incident.kind, incident.round, incident.iteration, incident.policy_version) == ("negative_kl", 1, 4, 3)
    assert "in 3 iterations in a row" in incident.what
    assert "alarm_negative_kl = 3" in incident.what
    assert incident.data == {"kl_k1_per_sequence": -0.25, "iterations_in_a_row": 3}
