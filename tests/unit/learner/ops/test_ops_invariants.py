"""What must not matter to any loss: padding, order, packing, and how a step is split over micro-batches and ranks."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, garbage_values
from torch import Tensor

from configs.algorithm import A2CConfig, APAConfig, AWRConfig, PPOConfig
from configs.correction import CorrectionConfig
from learner.ops import a2c, apa, awr, kl, off_policy, ppo, value
from learner.ops.advantages import gae, normalize
from learner.ops.aggregate import AggregationMode, token_weights
from learner.ops.rewards import per_token_rewards

Loss = Callable[[Batch, Tensor], tuple[Tensor, dict[str, Tensor]]]
MODES = get_args(AggregationMode)


def ppo_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return ppo.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=weights,
        settings=PPOConfig(dual_clip=1.5),
    )


def apa_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return apa.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=weights,
        settings=APAConfig(),
    )


def awr_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return awr.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=weights,
        settings=AWRConfig(max_weight=2.0),
    )


def a2c_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return a2c.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=weights,
        settings=A2CConfig(),
    )


def kl_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return kl.penalty(batch.logprobs, ref_logprobs=batch.ref_logprobs, weights=weights, estimator="k2"), {}


def corrected_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO with what the engine sampled taken for the reference's log-probs, and corrected for it."""
    rows = [getattr(batch, name) for name in ("old_logprobs", "ref_logprobs", "mask")]
    old, behavior, mask = [x[None] for x in rows] if batch.mask.ndim == 1 else rows
    settings = CorrectionConfig(weight="icepop", low=0.9, high=1.1)
    corrections = off_policy.importance_weights(old, behavior, mask=mask, settings=settings).view_as(batch.mask)
    return ppo_loss(batch, weights * corrections)


def value_loss(batch: Batch, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return value.loss(
        batch.values, old_values=batch.old_values, returns=batch.advantages, weights=weights, value_clip=0.2
    )


LOSSES = [ppo_loss, apa_loss, awr_loss, a2c_loss, kl_loss, corrected_loss, value_loss]


def weigh(mask: Tensor, mode: AggregationMode, whole: Batch) -> Tensor:
    """Weigh a part of a batch by the totals of the whole."""
    return token_weights(
        mask,
        mode=mode,
        num_tokens=int(whole.mask.sum()),
        num_sequences=len(whole.mask),
        constant=6.0,
        dtype=torch.float64,
    )


def evaluate(loss: Loss, batch: Batch, weights: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the loss with its diagnostics, and the gradient of the network's output, zero where there is none."""
    batch = batch.requiring_grad()
    total, diagnostics = loss(batch, weights)
    total.backward()
    gradient = batch.values.grad if loss is value_loss else batch.logprobs.grad
    assert gradient is not None
    return {"loss": total.detach(), **diagnostics}, gradient


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for key in mine:
        close(mine[key], theirs[key], atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
@given(batch=batches(), num_columns=st.integers(0, 4), garbage=garbage_values, random=st.randoms(use_true_random=False))
def test_i2_padding_and_row_order_do_not_change_the_loss(
    loss: Loss, mode: AggregationMode, batch: Batch, num_columns: int, garbage: float, random
):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    other = batch.padded(num_columns, garbage).rows(order)
    mine, gradient = evaluate(loss, batch, weigh(batch.mask, mode, batch))
    theirs, other_gradient = evaluate(loss, other, weigh(other.mask, mode, batch))
    assert_same(mine, theirs)
    width = batch.mask.shape[1]
    close(other_gradient[:, :width], gradient[order], atol=1e-12)
    assert (other_gradient[~other.mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@given(batch=batches())
def test_i2_packing_does_not_change_the_loss(loss: Loss, batch: Batch):
    weights = weigh(batch.mask, "seq_mean_token_mean", batch)
    packed = Batch(
        **{
            name: getattr(batch, name)[batch.mask]
            for name in ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values", "advantages", "mask")
        },
        scores=batch.scores,
    )
    mine, gradient = evaluate(loss, batch, weights)
    theirs, packed_gradient = evaluate(loss, packed, weights[batch.mask])
    assert_same(mine, theirs)
    close(packed_gradient, gradient[batch.mask], atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", LOSSES)
@given(batch=batches(), data=st.data())
def test_i3_micro_batch_and_data_parallel_splits_do_not_change_the_gradient(
    loss: Loss, mode: AggregationMode, batch: Batch, data: st.DataObject
):
    """Rows go to any of two ranks with two micro-batches each, some of which stay empty."""
    part_of_row = data.draw(st.lists(st.integers(0, 3), min_size=len(batch.mask), max_size=len(batch.mask)))
    whole, gradient = evaluate(loss, batch, weigh(batch.mask, mode, batch))
    sums = {key: torch.zeros((), dtype=torch.float64) for key in whole}
    for part in range(4):
        rows = [row for row, owner in enumerate(part_of_row) if owner == part]
        entries, part_gradient = evaluate(loss, batch.rows(rows), weigh(batch.mask[rows], mode, batch))
        sums = {key: sums[key] + entries[key] for key in sums}
        close(part_gradient, gradient[rows], atol=1e-12)
    assert_same(sums, whole)


def whole_chain(batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the PPO loss from scores, log-probs and values, as an iteration does."""
    rewards = per_token_rewards(
        batch.old_logprobs, batch.ref_logprobs, mask=batch.mask, scores=batch.scores, kl_beta=0.1
    )
    advantages, _ = gae(
        rewards,
        batch.old_values,
        mask=batch.mask,
        bootstrap_values=torch.zeros_like(batch.scores),
        gamma=1.0,
        gae_lambda=0.95,
    )
    logprobs = batch.logprobs.clone().requires_grad_()
    loss, _ = ppo.loss(
        logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=normalize(advantages, batch.mask, mode="whiten"),
        weights=token_weights(batch.mask, mode="token_mean", dtype=torch.float64),
        settings=PPOConfig(),
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


@given(
    batch=batches(min_rows=2),
    num_columns=st.integers(0, 4),
    garbage=garbage_values,
    random=st.randoms(use_true_random=False),
)
def test_i2_holds_from_the_scores_to_the_gradient(batch: Batch, num_columns: int, garbage: float, random):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    loss, gradient = whole_chain(batch)
    other_loss, other_gradient = whole_chain(batch.padded(num_columns, garbage).rows(order))
    close(other_loss, loss)
    close(other_gradient[:, : batch.mask.shape[1]], gradient[order])
