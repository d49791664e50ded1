"""Advantages, returns and their normalisation."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, make_batch, t64
from torch import Tensor

from learner.ops.advantages import choose_bootstrap_values, choose_learned, gae, normalize, without_critic
from learner.ops.rewards import last_token_mask, one_longer

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
FRACTIONS = st.floats(0, 1)
SEEDS = st.integers(0, 10_000)


def slow_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Sum the discounted one-step errors of every token outright, without a recursion."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        v = [*values[row, :length].tolist(), after[row].item()]
        errors = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * gae_lambda) ** (k - t) * errors[k] for k in range(t, length))
            returns[row, t] = advantages[row, t] + v[t]
    return advantages, returns


def toy(vectors, gae_lambda: float, after: list[float]) -> tuple[Tensor, Tensor]:
    v = vectors["V3_gae_terminal"]
    return gae(
        t64(v["rewards"]),
        t64(v["values"]),
        mask=MASK,
        bootstrap_values=t64(after),
        gamma=v["gamma"],
        gae_lambda=gae_lambda,
    )


@pytest.mark.parametrize(
    ("name", "gae_lambda", "after"),
    [
        ("V3_gae_terminal", None, [0.0, 0.0]),
        ("V3b_gae_lam1", 1.0, [0.0, 0.0]),
        ("V3c_gae_seq1_truncated_bootstrap", None, "boot_values"),
        ("V3d_gae_lam0", 0.0, [0.0, 0.0]),
    ],
)
def test_v3_advantages_and_returns(vectors, name: str, gae_lambda: float | None, after: list[float] | str):
    v = vectors[name]
    gae_lambda = vectors["V3_gae_terminal"]["lam"] if gae_lambda is None else gae_lambda
    advantages, returns = toy(vectors, gae_lambda, v[after] if isinstance(after, str) else after)
    close(advantages, v["adv"])
    if "returns" in v:
        close(returns, v["returns"])


def test_v3b_returns_are_rewards_to_go(vectors):
    _, returns = toy(vectors, 1.0, [0.0, 0.0])
    close(returns, vectors["V3b_gae_lam1"]["check_returns_eq_reward_to_go"])


@given(batches(), st.integers(0, 3), FRACTIONS, FRACTIONS)
def test_i2_advantages_equal_a_slow_loop_for_any_padding(
    batch: Batch, num_columns: int, gamma: float, gae_lambda: float
):
    wider = batch.padded(num_columns, float("nan"))
    found = gae(
        wider.advantages,
        wider.old_values,
        mask=wider.mask,
        bootstrap_values=wider.scores,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    expected = slow_gae(batch.advantages, batch.old_values, batch.mask, batch.scores, gamma, gae_lambda)
    width = batch.mask.shape[1]
    for mine, theirs in zip(found, expected, strict=True):
        close(mine[:, :width], torch.where(batch.mask, theirs, 0))
        assert (mine[~wider.mask] == 0).all()


@given(batches())
def test_i6_with_lambda_one_returns_are_rewards_to_go(batch: Batch):
    rewards = torch.where(batch.mask, batch.advantages, 0)
    zeros = torch.zeros_like(batch.scores)
    _, returns = gae(rewards, batch.old_values, mask=batch.mask, bootstrap_values=zeros, gamma=1.0, gae_lambda=1.0)
    for t in range(rewards.shape[1]):
        close(returns[:, t], torch.where(batch.mask[:, t], rewards[:, t:].sum(dim=1), 0))


@given(batches(), FRACTIONS)
def test_i6_with_lambda_zero_advantages_are_one_step_errors(batch: Batch, gamma: float):
    advantages, _ = gae(
        batch.advantages,
        batch.old_values,
        mask=batch.mask,
        bootstrap_values=batch.scores,
        gamma=gamma,
        gae_lambda=0.0,
    )
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        for t in range(length):
            after = batch.old_values[row, t + 1] if t + 1 < length else batch.scores[row]
            close(advantages[row, t], batch.advantages[row, t] + gamma * after - batch.old_values[row, t])


def test_i6_bootstrap_differs_from_terminal_on_truncated_rows_only(vectors):
    truncated = torch.tensor([False, True])
    ends = {
        mode: choose_bootstrap_values(t64([0.7, -0.25]), truncated_mask=truncated, truncated_value=mode)
        for mode in ("terminal", "bootstrap")
    }
    assert ends["terminal"].tolist() == [0.0, 0.0]
    assert ends["bootstrap"].tolist() == [0.0, -0.25]
    terminal, _ = toy(vectors, 0.95, ends["terminal"].tolist())
    bootstrap, _ = toy(vectors, 0.95, ends["bootstrap"].tolist())
    close(bootstrap[0], terminal[0])
    # Every token of the row moves by (gamma lambda)^(T - t) gamma V_{T+1}.
    close(bootstrap[1] - terminal[1], [-0.25 * 0.95**k for k in (3, 2, 1, 0)])


@given(batches(), st.floats(-3, 3))
def test_shifting_score_and_values_together_changes_no_advantage(batch: Batch, shift: float):
    rewards = torch.where(batch.mask, batch.advantages, 0)
    last = batch.mask.sum(dim=1) - 1
    shifted = rewards.clone()
    shifted[torch.arange(len(last)), last] += shift
    options = {"mask": batch.mask, "bootstrap_values": torch.zeros_like(batch.scores), "gamma": 1.0, "gae_lambda": 0.9}
    close(gae(shifted, batch.old_values + shift, **options)[0], gae(rewards, batch.old_values, **options)[0])


def test_advantages_have_no_gradient():
    values = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for result in gae(values, values, mask=mask, bootstrap_values=torch.zeros(1), gamma=1.0, gae_lambda=0.9):
        assert not result.requires_grad


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_a_mask_that_is_no_prefix_is_refused(row: list[bool]):
    with pytest.raises(ValueError, match="left-aligned prefix"):
        gae(
            torch.zeros(1, 3),
            torch.zeros(1, 3),
            mask=torch.tensor([row]),
            bootstrap_values=torch.zeros(1),
            gamma=1.0,
            gae_lambda=1.0,
        )


def test_bootstrap_values_of_another_shape_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="bootstrap_values must be like"):
        gae(
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            mask=mask,
            bootstrap_values=torch.zeros(3),
            gamma=1.0,
            gae_lambda=1.0,
        )


def test_an_unknown_end_is_refused():
    with pytest.raises(ValueError, match="unknown truncated_value"):
        choose_bootstrap_values(torch.zeros(1), truncated_mask=torch.ones(1, dtype=torch.bool), truncated_value="skip")


def test_nobody_bootstraps_from_a_dropped_response():
    truncated = torch.tensor([False, True])
    found = choose_bootstrap_values(t64([0.7, -0.25]), truncated_mask=truncated, truncated_value="drop")
    assert found.tolist() == [0.0, 0.0]


@given(batches(), FRACTIONS, FRACTIONS, st.floats(0, 2))
def test_a_reward_after_the_last_token_is_a_mixed_end_value(
    batch: Batch, gamma: float, gae_lambda: float, end_scale: float
):
    """A_T = r_T + gamma (lambda S + (1 - lambda) V_end) - V_T, whatever T and however wide the batch."""
    score, end = batch.scores, end_scale * batch.scores.flip(0)
    longer = one_longer(batch.mask)
    assert longer.sum(dim=1).tolist() == [n + 1 for n in batch.mask.sum(dim=1).tolist()]
    last = last_token_mask(longer)
    one = torch.zeros(len(score), 1, dtype=torch.float64)
    found, returns = gae(
        torch.where(last, score[:, None], torch.cat([batch.advantages, one], dim=1)),
        torch.where(last, end[:, None], torch.cat([batch.old_values, one], dim=1)),
        mask=longer,
        bootstrap_values=torch.zeros_like(score),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    mixed, _ = gae(
        batch.advantages,
        batch.old_values,
        mask=batch.mask,
        bootstrap_values=gae_lambda * score + (1 - gae_lambda) * end,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    close(torch.where(batch.mask, found[:, :-1], 0), mixed)
    close(returns[last], score)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("gae", [False, True, True, False, False, True]),
        ("reinforce", [False, True, True, False, False, True]),
        # Of prompt 1 a single response is left, of prompt 2 none.
        ("rloo", [False, True, True, False, False, False]),
        ("grpo", [False, True, True, False, False, False]),
    ],
)
def test_what_is_left_when_truncated_responses_are_dropped(estimator, expected: list[bool]):
    truncated = torch.tensor([True, False, False, True, True, False])
    groups = torch.tensor([0, 0, 0, 1, 2, 1])
    for mode in ("terminal", "bootstrap", "drop"):
        found = choose_learned(truncated, groups=groups, truncated_value=mode, estimator=estimator)
        assert found.tolist() == (expected if mode == "drop" else [True] * 6)


def test_normalisation_modes(vectors):
    v = vectors["V4_whiten"]
    advantages = t64(v["adv"])
    close(normalize(advantages, MASK, mode="none"), v["adv"])
    close(normalize(advantages, MASK, mode="whiten"), v["whitened_biased"], atol=2e-8)
    scaled = [[a / (0.67054611 + 1e-8) ** 0.5 for a in row] for row in v["adv"]]
    close(normalize(advantages, MASK, mode="batch_std_only"), scaled, atol=2e-8)


def test_normalisation_takes_the_moments_of_the_global_batch():
    advantages, mask = t64([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    close(normalize(advantages, mask, mode="whiten", mean=t64(1.0), var=t64(4.0)), [[0.0, 1.0, 0.0]])
    close(normalize(advantages, mask, mode="batch_std_only", mean=t64(1.0), var=t64(4.0)), [[0.5, 1.5, 0.0]])


@pytest.mark.parametrize("mode", ["none", "batch_std_only", "whiten"])
@given(batch=batches(min_rows=2), num_columns=st.integers(0, 3))
def test_i2_padding_and_row_order_do_not_change_the_normalisation(batch: Batch, mode, num_columns: int):
    width, order = batch.mask.shape[1], list(reversed(range(len(batch.mask))))
    other = batch.padded(num_columns, float("nan")).rows(order)
    found = normalize(other.advantages, other.mask, mode=mode)[order]
    close(found[:, :width], normalize(batch.advantages, batch.mask, mode=mode))
    assert (found[:, width:] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"mode": "z"}, "unknown"), ({"mode": "none", "var": t64(1)}, "both")]
)
def test_senseless_normalisations_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        normalize(torch.zeros(2, 4), MASK, **options)


def slow_without_critic(totals: list[float], groups: list[int], estimator: str) -> list[float]:
    found = []
    for i, (total, group) in enumerate(zip(totals, groups, strict=True)):
        everyone = [t for t, g in zip(totals, groups, strict=True) if g == group or estimator == "reinforce"]
        others = [t for j, (t, g) in enumerate(zip(totals, groups, strict=True)) if g == group and j != i]
        mean = sum(everyone) / len(everyone)
        std = (sum((t - mean) ** 2 for t in everyone) / len(everyone) + 1e-8) ** 0.5
        found.append(
            {
                "reinforce": total - mean,
                "rloo": total - sum(others) / len(others) if others else 0.0,
                "grpo": (total - mean) / std,
            }[estimator]
        )
    return found


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Batch, list[int]]:
    """Responses to one to three prompts, two or more each, in any order."""
    groups = [group for group in range(draw(st.integers(1, 3))) for _ in range(draw(st.integers(2, 4)))]
    batch = make_batch(draw(st.lists(st.integers(1, 4), min_size=len(groups), max_size=len(groups))), draw(SEEDS))
    return batch, draw(st.permutations(groups))


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
@given(case=grouped(), num_columns=st.integers(0, 2))
def test_advantages_without_a_critic_equal_a_slow_loop_for_any_padding_and_order(
    estimator, case: tuple[Batch, list[int]], num_columns: int
):
    batch, groups = case
    mask = batch.padded(num_columns, float("nan")).mask
    found = without_critic(batch.scores, groups=torch.tensor(groups), mask=mask, estimator=estimator)
    expected = t64(slow_without_critic(batch.scores.tolist(), groups, estimator))
    close(found, torch.where(mask, expected[:, None], 0))
    order = list(reversed(range(len(groups))))
    again = without_critic(
        batch.scores[order], groups=torch.tensor(groups)[order], mask=mask[order], estimator=estimator
    )
    close(again, found[order])


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
@given(case=grouped(), shift=st.floats(-5, 5))
def test_a_baseline_takes_a_common_shift_away(estimator, case: tuple[Batch, list[int]], shift: float):
    """One for each prompt where prompts have baselines of their own, one for the batch else."""
    batch, groups = case
    numbers = torch.tensor(groups)
    shifts = torch.full_like(batch.scores, shift) if estimator == "reinforce" else shift * (1.0 + numbers)
    options = {"groups": numbers, "mask": batch.mask, "estimator": estimator}
    close(without_critic(batch.scores + shifts, **options), without_critic(batch.scores, **options), atol=1e-7)


@given(case=grouped(), scale=st.floats(0.5, 20))
def test_grpo_has_no_units_and_the_others_have(case: tuple[Batch, list[int]], scale: float):
    batch, groups = case
    # The 1e-8 beside the variance has a unit: it must not be felt.
    assume(all(batch.scores[torch.tensor(groups) == group].var(correction=0) > 1e-3 for group in set(groups)))
    options = {"groups": torch.tensor(groups), "mask": batch.mask}
    for estimator, factor in (("grpo", 1.0), ("rloo", scale), ("reinforce", scale)):
        scaled = without_critic(batch.scores * scale, **options, estimator=estimator)
        close(scaled, factor * without_critic(batch.scores, **options, estimator=estimator), atol=1e-4)


def test_rloo_is_unbiased_and_a_baseline_with_the_own_reward_shrinks_the_gradient():
    """Over all pairs of samples of a bandit: E[A grad log pi] against the gradient of E[r]."""
    pi, rewards = t64([0.5, 0.3, 0.2]), t64([0.0, 1.0, 2.0])
    exact = pi * (rewards - (pi * rewards).sum())
    scores = torch.eye(3, dtype=torch.float64) - pi
    for estimator, factor in (("rloo", 1.0), ("reinforce", 0.5)):
        found = torch.zeros(3, dtype=torch.float64)
        for first in range(3):
            for second in range(3):
                advantages = without_critic(
                    rewards[[first, second]],
                    groups=torch.zeros(2, dtype=torch.int64),
                    mask=torch.ones(2, 1, dtype=torch.bool),
                    estimator=estimator,
                )[:, 0]
                found += pi[first] * pi[second] * (advantages[:, None] * scores[[first, second]]).mean(dim=0)
        close(found, factor * exact)


def test_equal_rewards_give_no_advantage_and_no_division_by_zero():
    groups, mask = torch.zeros(3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
    for estimator in ("rloo", "grpo", "reinforce"):
        assert not without_critic(torch.full((3,), 0.1), groups=groups, mask=mask, estimator=estimator).any()


def test_a_prompt_with_one_response_has_nothing_to_compare():
    groups, mask = torch.tensor([0, 0, 1]), torch.ones(3, 2, dtype=torch.bool)
    for estimator in ("rloo", "grpo"):
        with pytest.raises(ValueError, match="only one"):
            without_critic(torch.zeros(3), groups=groups, mask=mask, estimator=estimator)
    with pytest.raises(ValueError, match="unknown advantage estimator"):
        without_critic(torch.zeros(3), groups=groups, mask=mask, estimator="vine")
    with pytest.raises(ValueError, match="groups must be int64"):
        without_critic(torch.zeros(3), groups=groups.float(), mask=mask, estimator="rloo")
