"""Rewards per token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, t64

from learner.ops.rewards import last_token_mask, per_token_rewards


def test_v2_rewards_per_token(vectors):
    v = vectors["V2_reward"]
    mask = t64(v["mask"]).bool()
    rewards = per_token_rewards(
        t64(v["logp"]), t64(v["ref_logp"]), mask=mask, scores=t64(v["score"]), kl_beta=v["beta"]
    )
    close(rewards, v["rewards"])
    close(rewards.sum(dim=1), v["score_minus_beta_kl"])
    close(rewards.sum(dim=1), v["sum_rewards"])
    # Without a score, minus the rewards per unit of the coefficient are the KL of each token.
    options = {"mask": mask, "scores": t64([0.0, 0.0]), "kl_beta": -1.0}
    close(per_token_rewards(t64(v["logp"]), t64(v["ref_logp"]), **options), v["kl_tok"])
    assert last_token_mask(mask).nonzero()[:, 1].tolist() == v["last_idx"]


@pytest.mark.parametrize(("key", "last"), [("correct_mask", 2), ("response_mask", 2), ("action_mask_len_Tm1", 4)])
def test_v0_the_score_is_on_the_sampled_eos(vectors, key: str, last: int):
    v = vectors["V0_alignment"]
    mask = t64([v[key]]).bool()
    logprobs = t64([[-1.0] * mask.shape[1]])
    rewards = per_token_rewards(logprobs, logprobs, mask=mask, scores=t64([5.0]), kl_beta=0.1)
    assert rewards.nonzero().tolist() == [[0, last]]
    if key == "action_mask_len_Tm1":
        # Position j scores token j + 1; id 2 is the EOS that was sampled, not one of the pads after it.
        assert v["ids"][last + 1] == 2


def test_v0_a_mask_that_is_off_by_one_would_pay_for_padding(vectors):
    v = vectors["V0_alignment"]
    # Cut out of the attended positions where the first token is predicted, instead of where it is.
    attended = [int(token != 0) for token in v["ids"]]
    start, width = v["prompt_len"], len(v["response_mask"])
    assert attended[start : start + width] == v["correct_mask"]
    assert attended[start - 1 : start - 1 + width] == v["misaligned_mask_APA_repo"]
    assert last_token_mask(t64([v["misaligned_mask_APA_repo"]]).bool()).nonzero().tolist() != [[0, 2]]


@given(batches(), st.integers(0, 3), st.floats(0, 2))
def test_i1_rewards_sum_to_score_minus_kl_for_any_padding(batch: Batch, num_columns: int, kl_beta: float):
    wider = batch.padded(num_columns, float("nan"))
    rewards = per_token_rewards(
        wider.old_logprobs, wider.ref_logprobs, mask=wider.mask, scores=wider.scores, kl_beta=kl_beta
    )
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        kl_sum = sum((batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]).item() for t in range(length))
        close(rewards[row].sum(), batch.scores[row].item() - kl_beta * kl_sum)
        for t in range(length - 1):
            close(rewards[row, t], -kl_beta * (batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]).item())
    assert (rewards[~wider.mask] == 0).all()


@given(batches())
def test_i5_at_the_reference_only_the_score_is_left(batch: Batch):
    rewards = per_token_rewards(
        batch.old_logprobs, batch.old_logprobs, mask=batch.mask, scores=batch.scores, kl_beta=0.5
    )
    close(rewards, torch.where(last_token_mask(batch.mask), batch.scores[:, None], 0))


def test_k1_is_not_clamped_in_the_reward():
    rewards = per_token_rewards(
        t64([[0.0]]), t64([[-100.0]]), mask=torch.tensor([[True]]), scores=t64([0.0]), kl_beta=1.0
    )
    assert rewards.item() == -100.0


def test_rewards_have_no_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not per_token_rewards(logprobs, logprobs, mask=mask, scores=torch.ones(1), kl_beta=1.0).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.tensor([1.0, float("nan")])}, "scores must be finite"),
        ({"scores": torch.ones(3)}, "scores must be like"),
        ({"mask": torch.tensor([[True, True], [False, False]])}, "nowhere to put its score"),
        ({"mask": torch.ones(2, 2)}, "mask must be bool"),
    ],
)
def test_senseless_inputs_are_refused(changes: dict, message: str):
    arguments = {"mask": torch.ones(2, 2, dtype=torch.bool), "scores": torch.ones(2), "kl_beta": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        per_token_rewards(torch.zeros(2, 2), torch.zeros(2, 2), **arguments)


def test_log_probs_of_another_shape_are_refused():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="ref_logprobs must be like"):
        per_token_rewards(torch.zeros(2, 2), torch.zeros(2, 3), mask=mask, scores=torch.ones(2), kl_beta=0.1)
