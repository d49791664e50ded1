"""The loss of rankings, and what it shares with the loss of the pairs that they order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import close, t64

from learner.ops.reward_model import pairwise_loss, plackett_luce_loss

SCORES = st.floats(-8, 8)
RANKINGS = st.lists(st.tuples(SCORES, st.integers(1, 4)), min_size=2, max_size=5).filter(
    lambda entries: len({rank for _, rank in entries}) > 1
)
BATCHES = st.lists(RANKINGS, min_size=1, max_size=4)

Ranking = list[tuple[float, int]]


def pad(rankings: list[Ranking], *, extra: int = 0, garbage: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max((len(ranking) for ranking in rankings), default=0) + extra
    scores = [[s for s, _ in ranking] + [garbage] * (longest - len(ranking)) for ranking in rankings]
    ranks = [[rank for _, rank in ranking] + [0] * (longest - len(ranking)) for ranking in rankings]
    shape = (len(rankings), longest)
    return t64(scores).reshape(shape), torch.tensor(ranks, dtype=torch.int64).reshape(shape)


def run(rankings: list[Ranking], centering: float = 0.0, **padding: float) -> tuple[torch.Tensor, dict]:
    scores, ranks = pad(rankings, **padding)
    weights = torch.full((len(rankings),), 1 / len(rankings), dtype=torch.float64)
    return plackett_luce_loss(scores, ranks=ranks, weights=weights, centering_coefficient=centering)


def slow(ranking: Ranking, centering: float) -> dict[str, float]:
    """One ranking, term by term."""
    loss = 0.0
    right, middle, gap, pairs = 0, 0.0, 0.0, 0
    for score, rank in ranking:
        below = [other for other, other_rank in ranking if other_rank > rank]
        loss += math.log(math.exp(score) + sum(math.exp(other) for other in below)) - score
        for other in below:
            pairs += 1
            right += score > other
            middle += (score + other) / 2
            gap += score - other
    loss += centering * (2 * sum(score for score, _ in ranking) / len(ranking)) ** 2
    return {"loss": loss, "accuracy": right / pairs, "score_mean": middle / pairs, "score_gap_mean": gap / pairs}


def test_v11c_a_ranking_of_four(vectors):
    v = vectors["V11c_kwise"]
    loss, _ = run([[(score, rank) for rank, score in enumerate(v["scores_best_to_worst"], start=1)]])
    close(loss, v["plackett_luce_nll"])


def test_v11c_and_v11e_the_pairs_of_a_ranking(vectors):
    v = vectors["V11c_kwise"]
    pairs = [(v["scores_best_to_worst"][i], v["scores_best_to_worst"][j]) for i, j in v["pairs"]]
    chosen, rejected = t64(pairs).unbind(1)
    close(pairwise_loss(chosen, rejected, weights=t64([1 / 6] * 6))[0], v["K_choose_2_mean"])
    for i, expected in enumerate(v["pair_losses"]):
        close(pairwise_loss(chosen[i : i + 1], rejected[i : i + 1], weights=t64([1.0]))[0], expected)
    v = vectors["V11e_ties"]
    kept = [(v["scores"][i], v["scores"][j]) for i, j in v["pairs_kept"]]
    # The diagnostics of a ranking tell which pairs it counts: all but the two of one rank.
    found = run([list(zip(v["scores"], v["ranks"], strict=True))])[1]
    close(found["score_gap_mean"], sum(better - worse for better, worse in kept) / 5)
    close(pairwise_loss(*t64(kept).unbind(1), weights=t64([1 / 5] * 5))[0], v["loss"])


def test_v11c_of_two_it_is_the_pairwise_loss(vectors):
    v = vectors["V11c_kwise"]
    close(run([[(2.0, 1), (0.5, 2)]])[0], v["pl_K2_equals_BT"][0])
    close(pairwise_loss(t64([2.0]), t64([0.5]), weights=t64([1.0]))[0], v["pl_K2_equals_BT"][1])


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=5), st.floats(0, 0.5))
def test_i14_of_two_everything_is_that_of_pairs(pairs: list[tuple[float, float]], centering: float):
    mine = run([[(better, 1), (worse, 2)] for better, worse in pairs], centering)
    weights = torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64)
    theirs = pairwise_loss(*t64(pairs).unbind(1), weights=weights, centering_coefficient=centering)
    close(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    for name in mine[1]:
        close(mine[1][name], theirs[1][name])


@given(BATCHES, st.floats(0, 0.5))
def test_the_loss_equals_a_slow_loop(rankings: list[Ranking], centering: float):
    loss, diagnostics = run(rankings, centering)
    found = {"loss": loss, **diagnostics}
    expected = [slow(ranking, centering) for ranking in rankings]
    for name in found:
        close(found[name], sum(one[name] for one in expected) / len(rankings))


@given(BATCHES, st.integers(0, 3), st.sampled_from([0.0, -1e30, math.inf, math.nan]), st.data())
def test_i14_neither_the_order_of_completions_nor_padding_matters(
    rankings: list[Ranking], extra: int, garbage: float, data: st.DataObject
):
    other = [data.draw(st.permutations(ranking)) for ranking in rankings]
    mine, theirs = run(rankings, 0.01), run(other, 0.01, extra=extra, garbage=garbage)
    close(mine[0], theirs[0])
    for name in mine[1]:
        close(mine[1][name], theirs[1][name])


@given(BATCHES, st.data())
def test_i3_splits_add_up(rankings: list[Ranking], data: st.DataObject):
    cut = data.draw(st.integers(0, len(rankings)))
    whole, whole_diagnostics = run(rankings, 0.01)
    parts = []
    for part in (rankings[:cut], rankings[cut:]):
        scores, ranks = pad(part)
        weights = torch.full((len(part),), 1 / len(rankings), dtype=torch.float64)
        parts.append(plackett_luce_loss(scores, ranks=ranks, weights=weights, centering_coefficient=0.01))
    close(parts[0][0] + parts[1][0], whole)
    for name, total in whole_diagnostics.items():
        close(parts[0][1][name] + parts[1][1][name], total)


@given(RANKINGS, st.floats(-5, 5))
def test_i13_a_constant_changes_nothing_but_the_centering(ranking: Ranking, shift: float):
    close(run([[(score + shift, rank) for score, rank in ranking]])[0], run([ranking])[0])


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_gradcheck_and_nothing_for_padding(centering: float):
    scores, ranks = pad([[(0.3, 2), (-1.0, 1), (2.0, 2), (0.5, 3)], [(1.0, 2), (0.2, 1)]], garbage=math.inf)
    weights = t64([0.3, 0.7])

    def loss_of(given: torch.Tensor) -> torch.Tensor:
        whole = torch.where(ranks > 0, given, scores)
        return plackett_luce_loss(whole, ranks=ranks, weights=weights, centering_coefficient=centering)[0]

    start = torch.where(ranks > 0, scores, 0).requires_grad_()
    assert torch.autograd.gradcheck(loss_of, start)
    loss_of(start).backward()
    assert start.grad is not None
    assert (start.grad[1, 2:] == 0).all()


def test_two_tied_completions_do_not_push_each_other():
    scores = t64([[1.0, 0.3, -0.2]]).requires_grad_()
    plackett_luce_loss(scores, ranks=torch.tensor([[1, 2, 2]]), weights=t64([1.0]))[0].backward()
    # The tied ones are pushed down by the best alone, each by its share.
    total = math.exp(1.0) + math.exp(0.3) + math.exp(-0.2)
    assert scores.grad is not None
    close(scores.grad[0], [math.exp(1.0) / total - 1, math.exp(0.3) / total, math.exp(-0.2) / total])


def test_a_large_gap_the_wrong_way_stays_finite():
    assert run([[(-500.0, 1), (500.0, 2)]])[0].item() == 1000.0


def test_what_orders_nothing_is_refused():
    with pytest.raises(ValueError, match="must order at least two"):
        run([[(1.0, 1), (2.0, 1)]])
    with pytest.raises(ValueError, match="ranks must be int64"):
        plackett_luce_loss(torch.ones(1, 2), ranks=torch.ones(1, 2), weights=torch.ones(1))
    with pytest.raises(ValueError, match="weights must be like"):
        plackett_luce_loss(torch.ones(1, 2), ranks=torch.tensor([[1, 2]]), weights=torch.ones(2))
