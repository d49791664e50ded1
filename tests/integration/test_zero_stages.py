"""ZeRO 0 to 3, on one rank and on two, compute the same gradients, metrics and weights (real DeepSpeed, real gloo).

One rank is the slow half: tests/contract has it under every stage, against the same yardstick.
"""

from typing import Any

import pytest
import torch

from configs.learner import LearnerConfig
from learner.update import Updater
from tests.integration.zero_ranks import HIDDEN, RATE, SETTINGS, accumulate
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import PlainEngine
from tests.rank_processes import Worlds

STAGES = range(4)
WORLDS = (pytest.param(1, marks=pytest.mark.slow), 2)
GUARDED = (
    "applied_before",
    "loss_skipped",
    "loss_untouched",
    "gradient_skipped",
    "gradient_untouched",
    "applied_after",
    "stopped",
    "stopped_untouched",
    "parameter_found_on_all_ranks",
)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Run as many processes as are asked for through all stages, once."""
    return Worlds("tests.integration.zero_ranks", tmp_path_factory)


@pytest.fixture(scope="module")
def yardstick() -> dict[str, Any]:
    """Do the same with plain PyTorch on one rank."""

    def make() -> Updater:
        policy = PlainEngine(tiny_policy(hidden=HIDDEN), optimizer=RATE, settings=LearnerConfig())
        critic = PlainEngine(tiny_critic(hidden=HIDDEN), optimizer=RATE, settings=LearnerConfig())
        return Updater(policy=policy, critic=critic, settings=SETTINGS)

    updater = make()
    accumulate(updater.policy)
    gradient = torch.cat([g.flatten() for g in updater.policy.full_gradient().values()])
    updater = make()
    metrics = [updater.update(scored_batch(seed=i, iteration=i)).metrics for i in range(3)]
    weights = torch.cat([p.detach().flatten() for p in updater.policy.module.parameters()])
    return {"gradient": gradient, "metrics": metrics, "weights": weights}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_equal(findings: Any, yardstick: Any, stage: int, world_size: int) -> None:
    expected = yardstick["gradient"]
    for rank in findings[world_size]:
        gradient = rank["stages"][stage]["gradient"]
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_three_iterations_have_equal_metrics(findings: Any, yardstick: Any, stage: int, world_size: int) -> None:
    for rank in findings[world_size]:
        for i, (metrics, expected) in enumerate(
            zip(rank["stages"][stage]["metrics"], yardstick["metrics"], strict=True)
        ):
            num_tokens = sum(len(scored.rollout.response_ids) for scored in scored_batch(seed=i, iteration=i).rollouts)
            assert set(metrics) == set(expected)
            for name, value in expected.items():
                # A fraction is a count: one token on the edge of the clip may fall on either side, two may not.
                edge = 1.5 / num_tokens if "fraction" in name else 1e-5
                assert metrics[name] == pytest.approx(value, rel=1e-3, abs=edge), name


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_weights_end_up_equal(findings: Any, yardstick: Any, stage: int, world_size: int) -> None:
    start = torch.cat([p.detach().flatten() for p in tiny_policy(hidden=HIDDEN).parameters()])
    moved = (yardstick["weights"] - start).norm()
    for rank in findings[world_size]:
        assert (rank["stages"][stage]["weights"] - yardstick["weights"]).norm() < 1e-2 * moved


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_i24_a_checkpoint_resumes_bit_for_bit(findings: Any, stage: int, world_size: int) -> None:
    assert all(rank["stages"][stage]["resumes_bit_for_bit"] for rank in findings[world_size])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_one_rank_s_disk_refuses_is_raised_on_all_and_leaves_no_trace(
    findings: Any, stage: int, world_size: int
) -> None:
    """That it leaves none is what the test above shows: the attempt comes between the checkpoint and its last step."""
    writer = world_size - 1 if stage > 0 else 0
    for rank in findings[world_size]:
        assert rank["stages"][stage]["refused"] == f"EFBIG: File too large (learner rank {writer})"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_published_buckets_are_the_full_parameters(findings: Any, stage: int, world_size: int) -> None:
    assert findings[world_size][0]["stages"][stage]["published_equals_weights"]


def test_all_ranks_report_the_same(findings: Any) -> None:
    first, second = (rank["stages"] for rank in findings[2])
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"]
    assert all(rank["evaluations_agree"] for rank in findings[2])


def test_zero_3_in_bf16_has_its_own_guard(findings: Any) -> None:
    """DeepSpeed's own norm of such a gradient has been a plausible number: this engine measures its partitions."""
    for rank in findings[2]:
        assert rank["guards"][3, "bf16"] == dict.fromkeys(GUARDED, True)


def test_one_poisoned_rank_never_reaches_the_weights(findings: Any) -> None:
    for rank in findings[2]:
        for where, guard in rank["guards"].items():
            assert guard == dict.fromkeys(GUARDED, True), where
