"""DPO and rejection-sampling fine-tuning through the real updater: slow loops, invariances, ties, and the memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.learner import BatchGuardsConfig, LearnerConfig
from configs.selection import DPOConfig, RFTConfig, SelectionConfig
from learner import checkpoint
from learner.selection_update import SelectionUpdater
from protocol import metrics as names
from protocol.errors import NonFiniteError, UntrustedBatchError
from protocol.messages import ScoredBatch, ScoredRollout
from tests.learner_batches import tiny_policy
from tests.selection_batches import (
    at_the_reference,
    make_updater,
    plain_logprobs,
    sampled,
    with_same_response,
    with_scores,
)

DPO = DPOConfig(minibatch_responses=4, num_epochs=2)
RFT = RFTConfig(minibatch_responses=4, num_epochs=2, kept_per_prompt=2, memory_responses=5)
WHOLE: dict[str, Any] = {"minibatch_responses": 64, "num_epochs": 1}
FORMS = [("dpo", 0.0), ("cdpo", 0.1), ("robust", 0.2), ("ipo", 0.0)]


def of_prompts(batch: ScoredBatch) -> list[list[ScoredRollout]]:
    """Group a batch by prompt, the best response first."""
    groups: dict[str, list[ScoredRollout]] = {}
    for scored in batch.rollouts:
        groups.setdefault(scored.rollout.key.prompt_id, []).append(scored)
    return [sorted(group, key=lambda scored: -scored.score) for group in groups.values()]


def weights_of(updater: SelectionUpdater) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in updater.policy.module.parameters()])


def gradient_of(module: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize(("kind", "flips"), FORMS)
def test_one_step_of_dpo_against_a_slow_loop(kind: Any, flips: float) -> None:
    """Sums over response tokens, the reference's from the batch, at the sampling temperature; prompts do not enter."""
    beta, temperature, policy = 0.3, 0.8, tiny_policy()
    algorithm = DPOConfig(kind=kind, dpo_beta=beta, flip_probability=flips, **WHOLE)
    batch, updater = sampled(), make_updater(algorithm, temperature=temperature)

    def logprob(scored: ScoredRollout) -> Tensor:
        rollout = scored.rollout
        return plain_logprobs(policy.network, rollout.prompt.token_ids, rollout.response_ids, temperature).sum()

    losses, figures = [], {"chosen": 0.0, "rejected": 0.0, "chosen ratio": 0.0, "margin": 0.0, "right": 0.0}
    for best, _, worst in of_prompts(batch):
        chosen, rejected = logprob(best), logprob(worst)
        ref_chosen, ref_rejected = float(best.ref_logprobs.sum()), float(worst.ref_logprobs.sum())
        h = (chosen - rejected) - (ref_chosen - ref_rejected)
        right, wrong = torch.log1p(torch.exp(-beta * h)), torch.log1p(torch.exp(beta * h))
        losses.append(
            {
                "dpo": right,
                "cdpo": (1 - flips) * right + flips * wrong,
                "robust": ((1 - flips) * right - flips * wrong) / (1 - 2 * flips),
                "ipo": (h - 1 / (2 * beta)) ** 2,
            }[kind]
        )
        figures["chosen"] += chosen.item() / 6
        figures["rejected"] += rejected.item() / 6
        figures["chosen ratio"] += (chosen.item() - ref_chosen) / 6
        figures["margin"] += h.item() / 6
        figures["right"] += float(h.item() > 0) / 6
    (sum(losses) / 6).backward()
    report = updater.update(batch)
    [gradient] = updater.policy.gradients
    assert (gradient - gradient_of(policy)).norm() < 1e-4 * gradient_of(policy).norm()
    found = report.metrics
    assert found[names.POLICY_LOSS] == pytest.approx(sum(loss.item() for loss in losses) / 6, rel=1e-4)
    assert found[names.DPO_CHOSEN] == pytest.approx(figures["chosen"], rel=1e-5)
    assert found[names.DPO_REJECTED] == pytest.approx(figures["rejected"], rel=1e-5)
    assert found[names.DPO_CHOSEN_RATIO] == pytest.approx(figures["chosen ratio"], rel=1e-4, abs=1e-4)
    assert found[names.DPO_MARGIN] == pytest.approx(figures["margin"], rel=1e-4, abs=1e-4)
    assert found[names.DPO_ACCURACY] == pytest.approx(figures["right"], abs=1e-6)
    assert (found[names.DPO_PAIRS], found[names.DPO_TIED], found[names.DPO_IDENTICAL]) == (6, 0, 0)
    assert found[names.POLICY_FIRST_RATIO_GAP] < 1e-5
    assert report.num_steps == 1


def test_i5_at_the_reference_the_loss_is_ln_2_and_pulls_by_half_of_beta() -> None:
    batch, beta = at_the_reference(sampled()), 0.4
    updater, policy = make_updater(DPOConfig(dpo_beta=beta, **WHOLE)), tiny_policy()
    metrics = updater.update(batch).metrics
    assert metrics[names.POLICY_LOSS] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[names.DPO_MARGIN] == pytest.approx(0, abs=1e-4)
    assert metrics[names.OBJECTIVE_KL] == pytest.approx(0, abs=1e-4)
    for best, _, worst in of_prompts(batch):
        for scored, sign in ((best, -1), (worst, 1)):
            rollout = scored.rollout
            own = plain_logprobs(policy.network, rollout.prompt.token_ids, rollout.response_ids).sum()
            (sign * beta / 2 * own / 6).backward()
    [gradient] = updater.policy.gradients
    assert (gradient - gradient_of(policy)).norm() < 1e-4 * gradient_of(policy).norm()


@pytest.mark.parametrize("algorithm", [DPO, RFT], ids=["dpo", "rft"])
@pytest.mark.parametrize(
    "other",
    [{"token_budget": 40}, {"layout": "packed"}, {"token_budget": 70, "layout": "packed"}, {"pad_id": 9}],
    ids=["small micro-batches", "packed", "packed and small", "another padding"],
)
def test_layout_and_split_change_neither_gradients_nor_metrics(algorithm: SelectionConfig, other: dict) -> None:
    plain, varied = make_updater(algorithm), make_updater(algorithm, **other)
    for iteration in range(2):  # the second with a memory
        batch = sampled(seed=iteration, iteration=iteration)
        first, second = (updater.update(batch).metrics for updater in (plain, varied))
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    # DPO: 6 pairs, 2 to a step; RFT: 12 chosen, then 12 and 5 remembered ones, 4 at most to a step.
    assert len(plain.policy.gradients) == (2 * (3 + 3) if algorithm is DPO else 2 * (3 + 5))
    first, second = plain.policy.gradients[0], varied.policy.gradients[0]
    assert (first - second).norm() < 1e-5 * first.norm()


@pytest.mark.parametrize("algorithm", [DPOConfig(**WHOLE), RFTConfig(**WHOLE)], ids=["dpo", "rft"])
def test_the_order_of_the_responses_changes_nothing(algorithm: SelectionConfig) -> None:
    batch = sampled()
    order = np.random.default_rng(3).permutation(len(batch.rollouts))
    shuffled = replace(batch, rollouts=tuple(batch.rollouts[place] for place in order))
    updaters = [make_updater(algorithm), make_updater(algorithm)]
    reports = [updater.update(found) for updater, found in zip(updaters, (batch, shuffled), strict=True)]
    first, second = (updater.policy.gradients[0] for updater in updaters)
    assert (first - second).norm() < 1e-5 * first.norm()
    for name, value in reports[0].metrics.items():
        assert reports[1].metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for key, nats in reports[0].kl_nats_per_sequence.items():
        assert reports[1].kl_nats_per_sequence[key] == pytest.approx(nats, abs=1e-4)


def test_a_prompt_without_a_pair_is_counted_and_teaches_nothing() -> None:
    batch = sampled()
    scores = [scored.score for scored in batch.rollouts]
    scores[3:6] = [0.7] * 3  # the second prompt ties
    batch = with_same_response(with_scores(batch, scores), [6, 7, 8])  # the third has one response
    batch = with_same_response(batch, [9, 10])
    updater, without = make_updater(DPOConfig(**WHOLE)), make_updater(DPOConfig(**WHOLE))
    metrics = updater.update(batch).metrics
    assert (metrics[names.DPO_PAIRS], metrics[names.DPO_TIED], metrics[names.DPO_IDENTICAL]) == (4, 1, 1)
    without.update(replace(batch, rollouts=batch.rollouts[:3] + batch.rollouts[9:]))
    first, second = updater.policy.gradients[0], without.policy.gradients[0]
    assert (first - second).norm() < 1e-5 * second.norm()


def test_a_batch_without_any_pair_makes_no_step_and_says_so() -> None:
    updater = make_updater(DPO)
    before = weights_of(updater)
    report = updater.update(with_scores(sampled(), [0.5] * 18))
    assert (report.num_steps, report.num_skipped_steps) == (0, 0)
    assert (report.metrics[names.DPO_PAIRS], report.metrics[names.DPO_TIED]) == (0, 6)
    assert names.POLICY_LOSS not in report.metrics
    assert {names.OBJECTIVE_SCORE, names.OBJECTIVE_KL, names.POLICY_ENTROPY} <= report.metrics.keys()
    assert torch.equal(weights_of(updater), before)


def test_dpo_prefers_what_scored_higher_more_with_every_update() -> None:
    updater, batch = make_updater(DPOConfig(minibatch_responses=12)), at_the_reference(sampled())
    found = [updater.update(batch).metrics for _ in range(8)]
    margins = [metrics[names.DPO_MARGIN] for metrics in found]
    assert all(later > earlier for earlier, later in pairwise(margins))
    assert found[-1][names.DPO_ACCURACY] == 1.0
    ratios = found[-1][names.DPO_CHOSEN_RATIO], found[-1][names.DPO_REJECTED_RATIO]
    assert ratios[0] - ratios[1] == pytest.approx(margins[-1], abs=1e-4)


def test_rft_steps_against_a_slow_loop_with_all_of_the_memory() -> None:
    """Iteration by iteration, the training set is what is best now and everything that was the best before."""
    temperature, known = 0.8, {}
    updater = make_updater(RFTConfig(memory_responses=100, **WHOLE), temperature=temperature)
    for iteration in range(3):
        batch = sampled(seed=iteration, iteration=iteration)
        best = [group[0] for group in of_prompts(batch)]
        policy = tiny_policy()
        policy.load_state_dict(updater.policy.module.state_dict())
        for scored in best:
            rollout = scored.rollout
            known[rollout.prompt.prompt_id, rollout.response_ids.tobytes()] = rollout
        parts = [
            -plain_logprobs(policy.network, rollout.prompt.token_ids, rollout.response_ids, temperature)
            for rollout in known.values()
        ]
        nll = torch.cat(parts).mean()
        nll.backward()
        metrics = updater.update(batch).metrics
        gradient = updater.policy.gradients[iteration]
        assert (gradient - gradient_of(policy)).norm() < 1e-4 * gradient_of(policy).norm()
        assert metrics[names.POLICY_LOSS] == pytest.approx(nll.item(), rel=1e-5)
        assert metrics[names.RFT_NLL] == pytest.approx(nll.item(), rel=1e-5)
        assert metrics[names.RFT_CHOSEN_SCORE] == pytest.approx(sum(scored.score for scored in best) / 6)
        assert (metrics[names.RFT_CHOSEN], metrics[names.RFT_RECALLED]) == (6, 6 * iteration)
        assert metrics[names.RFT_MEMORY] == len(known) == 6 * (iteration + 1)
        assert not [name for name in metrics if name.startswith(("dpo/", "value/"))]


def test_a_response_that_is_sampled_again_counts_once() -> None:
    updater, batch = make_updater(RFTConfig(**WHOLE)), sampled()
    updater.update(batch)
    again = replace(
        batch,
        iteration=1,
        rollouts=tuple(
            replace(scored, rollout=replace(scored.rollout, key=scored.rollout.key._replace(iteration=1)))
            for scored in batch.rollouts
        ),
    )
    metrics = updater.update(again).metrics
    assert (metrics[names.RFT_CHOSEN], metrics[names.RFT_RECALLED], metrics[names.RFT_MEMORY]) == (6, 0, 6)


def test_a_bounded_recall_is_of_the_seed_round_and_iteration() -> None:
    def loss(run_seed: int, iteration: int) -> float:
        updater = make_updater(RFTConfig(memory_responses=2, **WHOLE))
        updater.settings = replace(updater.settings, run_seed=run_seed)
        updater.update(sampled())
        metrics = updater.update(replace(sampled(seed=1, iteration=1), iteration=iteration)).metrics
        assert metrics[names.RFT_RECALLED] == 2
        return metrics[names.POLICY_LOSS]

    assert loss(0, 1) == loss(0, 1)
    assert len({loss(0, iteration) for iteration in range(1, 6)}) > 2


@pytest.mark.parametrize("algorithm", [DPO, RFT], ids=["dpo", "rft"])
def test_i24_what_a_checkpoint_keeps_continues_bit_for_bit(algorithm: SelectionConfig, tmp_path: Path) -> None:
    updater = make_updater(algorithm)
    for iteration in range(2):
        updater.update(sampled(seed=iteration, iteration=iteration))
    state = checkpoint.LearnerState(policy_version=3, kl_controller=None, world_size=1, zero_stage=0)
    checkpoint.save(tmp_path, engines=updater.engines, state=state)
    resumed = make_updater(algorithm)
    checkpoint.load(tmp_path, engines=resumed.engines, zero_stage=0)
    if updater.memory is not None:
        updater.memory.write(tmp_path)
        resumed.memory.read(tmp_path)
    assert (updater.memory is not None) == (algorithm is RFT)
    batch = sampled(seed=2, iteration=2)
    assert resumed.update(batch) == updater.update(batch)
    assert torch.equal(weights_of(resumed), weights_of(updater))


def test_the_memory_is_carried_into_a_round_that_starts_from_another_policy(tmp_path: Path) -> None:
    first = make_updater(RFT)
    first.update(sampled())
    first.memory.write(tmp_path)
    second = make_updater(RFT)
    second.memory.read(tmp_path)
    metrics = second.update(sampled(seed=5, round=2)).metrics
    assert (metrics[names.RFT_RECALLED], metrics[names.RFT_MEMORY]) == (5, 24)
    assert make_updater(RFT).update(sampled(seed=5, round=2)).metrics[names.RFT_RECALLED] == 0


@pytest.mark.parametrize("algorithm", [DPO, RFT], ids=["dpo", "rft"])
def test_a_batch_that_another_policy_sampled_is_refused_before_anything_is_learned(algorithm: SelectionConfig) -> None:
    guarded = make_updater(algorithm, guards=BatchGuardsConfig())
    before = weights_of(guarded)
    with pytest.raises(UntrustedBatchError, match="logprob_gap_mean_nats"):
        guarded.update(sampled())
    assert torch.equal(weights_of(guarded), before)
    assert guarded.memory is None or len(guarded.memory) == 0
    assert [len(part) for part in guarded.computed["old_logprobs"]] == [
        len(scored.rollout.response_ids) for scored in sampled().rollouts
    ]
    assert guarded.update(at_the_reference(sampled())).num_steps > 0


def broken_score(scored: ScoredRollout) -> ScoredRollout:
    return replace(scored, score=math.nan)


def broken_reference(scored: ScoredRollout) -> ScoredRollout:
    return replace(scored, ref_logprobs=np.full_like(scored.ref_logprobs, -np.inf))


@pytest.mark.parametrize("change", [broken_score, broken_reference])
def test_numbers_that_are_not_finite_name_their_rollout(change: Callable[[ScoredRollout], ScoredRollout]) -> None:
    batch = sampled()
    rollouts = list(batch.rollouts)
    rollouts[4] = change(rollouts[4])
    with pytest.raises(NonFiniteError, match=r"r1/i0/p0001#1"):
        make_updater(DPO).update(replace(batch, rollouts=tuple(rollouts)))


def test_a_step_whose_loss_overflows_is_skipped_where_that_is_allowed() -> None:
    batch = sampled()
    rollouts = list(batch.rollouts)
    rollouts[4] = replace(rollouts[4], ref_logprobs=np.full_like(rollouts[4].ref_logprobs, -1e38))
    batch = with_scores(replace(batch, rollouts=tuple(rollouts)), [float(place % 3 == 1) for place in range(18)])
    # h of the second prompt is beyond fp32's square, so ipo's loss is not finite.
    algorithm = DPOConfig(kind="ipo", minibatch_responses=4)
    with pytest.raises(NonFiniteError, match="loss of the policy"):
        make_updater(algorithm).update(batch)
    report = make_updater(algorithm, settings=LearnerConfig(on_nonfinite="skip")).update(batch)
    assert (report.num_steps, report.num_skipped_steps) == (2, 1)
    assert report.metrics[names.POLICY_SKIPPED_STEPS] == 1
    assert all(math.isfinite(value) for name, value in report.metrics.items() if name != names.OBJECTIVE_KL)
