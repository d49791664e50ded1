"""The critic's loss."""

import pytest
import torch
from hypothesis import given
from op_batches import Batch, batches, close, make_batch, t64

from learner.ops import value
from learner.ops.aggregate import token_weights

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def slow_loss(batch: Batch, value_clip: float | None) -> tuple[float, float]:
    total, clipped_tokens, num_tokens = 0.0, 0, int(batch.mask.sum())
    for row, t in batch.mask.nonzero().tolist():
        v, old, ret = (x[row, t].item() for x in (batch.values, batch.old_values, batch.advantages))
        error = (v - ret) ** 2
        if value_clip is not None:
            clipped = (old + min(max(v - old, -value_clip), value_clip) - ret) ** 2
            clipped_tokens += clipped > error
            error = max(error, clipped)
        total += 0.5 * error
    return total / num_tokens, clipped_tokens / num_tokens


def run(batch: Batch, value_clip: float | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = token_weights(batch.mask, mode="token_mean", dtype=torch.float64)
    return value.loss(
        batch.values, old_values=batch.old_values, returns=batch.advantages, weights=weights, value_clip=value_clip
    )


@pytest.mark.parametrize(("clipped", "key"), [(False, "loss_unclipped"), (True, "loss_clipped")])
def test_v6_value_loss(vectors, clipped: bool, key: str):
    v = vectors["V6_value"]
    options = {
        "old_values": t64(v["V_old"]),
        "returns": t64(v["returns"]),
        "weights": token_weights(MASK, mode="token_mean", dtype=torch.float64),
    }
    loss, diagnostics = value.loss(t64(v["V_new"]), **options, value_clip=v["clip"] if clipped else None)
    close(loss, v[key])
    close(diagnostics["clip_fraction"], v["clipfrac"] if clipped else 0.0)


def test_v6_the_clipped_loss_is_the_larger_of_the_two_values_losses(vectors):
    v = vectors["V6_value"]
    for row, t in MASK.nonzero().tolist():
        options = {"old_values": t64([v["V_old"][row][t]]), "returns": t64([v["returns"][row][t]])}
        options["weights"] = t64([1.0])
        found, _ = value.loss(t64([v["V_new"][row][t]]), **options, value_clip=v["clip"])
        candidates = [
            value.loss(t64([v[key][row][t]]), **options, value_clip=None)[0] for key in ("V_new", "V_clipped")
        ]
        close(found, max(candidates))


@pytest.mark.parametrize("value_clip", [None, 0.2])
@given(batch=batches())
def test_the_loss_equals_a_slow_loop(batch: Batch, value_clip: float | None):
    loss, diagnostics = run(batch, value_clip)
    expected, expected_fraction = slow_loss(batch, value_clip)
    close(loss, expected)
    close(diagnostics["clip_fraction"], expected_fraction)


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_gradcheck(value_clip: float | None):
    batch = make_batch([3, 1, 4], seed=5)
    values = batch.values.clone().requires_grad_()
    weights = token_weights(batch.mask, mode="token_mean", dtype=torch.float64)
    options = {"old_values": batch.old_values, "returns": batch.advantages, "weights": weights}
    assert torch.autograd.gradcheck(lambda v: value.loss(v, **options, value_clip=value_clip)[0], values)


@given(batches())
def test_i9_the_clipped_loss_is_never_the_smaller_one(batch: Batch):
    for row, t in batch.mask.nonzero().tolist():
        v, old, ret = (x[row, t].reshape(1) for x in (batch.values, batch.old_values, batch.advantages))
        options = {"old_values": old, "returns": ret, "weights": torch.ones_like(v)}
        plain, _ = value.loss(v, **options, value_clip=None)
        clipped, _ = value.loss(v, **options, value_clip=0.2)
        assert clipped >= plain
        if (v - old).abs().item() < 0.2:
            assert clipped.item() == pytest.approx(plain.item())


def test_only_the_values_get_a_gradient():
    tensors = {name: torch.ones(2, requires_grad=True) for name in ("values", "old_values", "returns")}
    loss, diagnostics = value.loss(
        tensors["values"],
        old_values=tensors["old_values"],
        returns=tensors["returns"] + 1,
        weights=torch.ones(2),
        value_clip=0.2,
    )
    loss.backward()
    assert tensors["values"].grad is not None
    assert tensors["old_values"].grad is None
    assert tensors["returns"].grad is None
    assert not any(entry.requires_grad for entry in diagnostics.values())


def test_explained_variance():
    returns, mask = t64([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    close(value.explained_variance(returns, returns, mask=mask), 1.0)
    close(value.explained_variance(torch.full_like(returns, 2.0), returns, mask=mask), 0.0)
    close(value.explained_variance(-returns, returns, mask=mask), -3.0)
    close(value.explained_variance(returns, torch.ones_like(returns), mask=mask), 0.0)


def test_unlike_tensors_are_refused():
    with pytest.raises(ValueError, match="returns must be like values"):
        value.loss(
            torch.ones(2), old_values=torch.ones(2), returns=torch.ones(3), weights=torch.ones(2), value_clip=None
        )
