"""Token weights: the aggregation modes, globally normalised."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, t64

from configs.algorithm import PolicyGradientBase
from learner.ops.aggregate import AggregationMode, token_weights, weighted_sum

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
MODES = get_args(AggregationMode)


def weigh(mask: torch.Tensor, **arguments) -> torch.Tensor:
    return token_weights(mask, dtype=torch.float64, **arguments)


def slow_aggregate(losses: torch.Tensor, mask: torch.Tensor, mode: str, constant: float) -> float:
    rows = [
        [loss for loss, keep in zip(row, keeps, strict=True) if keep]
        for row, keeps in zip(losses.tolist(), mask.tolist(), strict=True)
    ]
    rows = [row for row in rows if row]
    total = sum(sum(row) for row in rows)
    return {
        "token_mean": total / sum(len(row) for row in rows),
        "seq_mean_token_mean": sum(sum(row) / len(row) for row in rows) / len(rows),
        "seq_mean_token_sum": total / len(rows),
        "token_sum_norm": total / constant,
    }[mode]


def test_the_modes_are_those_of_the_configuration():
    assert get_args(PolicyGradientBase.model_fields["aggregation"].annotation) == MODES


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        ("token_mean", "token_mean"),
        ("seq_mean_token_mean", "seq_mean_token_mean"),
        ("seq_mean_token_sum", "seq_mean_token_sum"),
        ("token_sum_norm", "seq_mean_token_sum_norm_T4"),
    ],
)
def test_v5_aggregates_of_one_batch(vectors, mode: AggregationMode, key: str):
    v = vectors["V5_ppo"]
    close(weighted_sum(t64(v["loss_tok"]), weigh(MASK, mode=mode, constant=4)), v[key], atol=2e-8)


@pytest.mark.parametrize("mode", MODES)
@given(batch=batches())
def test_aggregates_equal_a_slow_loop(batch: Batch, mode: AggregationMode):
    weights = weigh(batch.mask, mode=mode, constant=3.5)
    close(weighted_sum(batch.advantages, weights), slow_aggregate(batch.advantages, batch.mask, mode, 3.5))


def test_v18_ranks_add_up_to_the_global_mean(vectors):
    v = vectors["V18_sharding"]
    losses, mask = t64(v["loss"]), t64(v["mask"]).bool()
    ranks = [slice(0, 2), slice(2, 3)]
    parts = [weighted_sum(losses[r], weigh(mask[r], mode="token_mean", num_tokens=6)) for r in ranks]
    close(sum(parts), v["global_token_mean"])
    # An engine that averages over ranks is handed each rank's loss times the number of ranks.
    for part, expected in zip(parts, v["corrected_rank"], strict=True):
        close(part * 2, expected)
    naive = [weighted_sum(losses[r], weigh(mask[r], mode="token_mean")) for r in ranks]
    close(sum(naive) / 2, v["naive_rank_mean"])


@pytest.mark.parametrize("mode", MODES)
@given(batch=batches(), data=st.data())
def test_i3_splits_add_up(batch: Batch, mode: AggregationMode, data: st.DataObject):
    part_of_row = data.draw(st.lists(st.integers(0, 2), min_size=len(batch.mask), max_size=len(batch.mask)))
    totals = {"num_tokens": int(batch.mask.sum()), "num_sequences": len(batch.mask), "constant": 9.0}
    whole = weighted_sum(batch.advantages, weigh(batch.mask, mode=mode, constant=9.0))
    parts = [batch.rows([i for i, p in enumerate(part_of_row) if p == part]) for part in range(3)]
    close(sum(weighted_sum(part.advantages, weigh(part.mask, mode=mode, **totals)) for part in parts), whole)


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_tokens_are_no_sequences(mode: AggregationMode):
    with_empty = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.bool)])
    torch.testing.assert_close(weigh(with_empty, mode=mode, constant=4)[:2], weigh(MASK, mode=mode, constant=4))
    assert (weigh(with_empty, mode=mode, constant=4)[2:] == 0).all()


@pytest.mark.parametrize(
    ("mode", "total"),
    [("token_mean", 1), ("seq_mean_token_mean", 1), ("seq_mean_token_sum", 3.5), ("token_sum_norm", 1.75)],
)
def test_the_weights_of_a_step_sum_to_what_the_docstring_says(mode: AggregationMode, total: float):
    close(weigh(MASK, mode=mode, constant=4).sum(), total)


def test_an_empty_micro_batch_weighs_nothing():
    empty = torch.zeros(1, 3, dtype=torch.bool)
    assert (token_weights(empty, mode="token_mean", num_tokens=5) == 0).all()
    assert (token_weights(empty, mode="seq_mean_token_mean", num_sequences=5) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "token_sum_norm"}, "positive constant"),
        ({"mode": "token_sum_norm", "constant": 0}, "positive constant"),
        ({"mode": "token_mean", "num_tokens": 0}, "positive num_tokens"),
        ({"mode": "seq_mean_token_sum", "num_sequences": -1}, "positive num_sequences"),
        ({"mode": "mean"}, "unknown aggregation mode"),
    ],
)
def test_missing_or_senseless_divisors_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        token_weights(MASK, **arguments)


@pytest.mark.parametrize("mask", [MASK.float(), MASK[0]])
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        token_weights(mask, mode="token_mean")
