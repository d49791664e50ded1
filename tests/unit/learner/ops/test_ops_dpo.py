"""Direct preference optimisation and its three relatives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, garbage_values, t64

from learner.ops import dpo
from learner.ops.kl import exact

LOGPROBS = st.floats(-40, -0.1)
PAIRS = st.lists(st.tuples(LOGPROBS, LOGPROBS, LOGPROBS, LOGPROBS), min_size=1, max_size=5)
FORMS = [("dpo", 0.0), ("cdpo", 0.1), ("robust", 0.1), ("ipo", 0.0)]
NAMES = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")


def run(pairs: list, kind: str, flips: float, beta: float = 0.1, of: int = 0) -> tuple[torch.Tensor, dict]:
    chosen, rejected, ref_chosen, ref_rejected = t64(pairs).reshape(-1, 4).unbind(1)
    return dpo.loss(
        chosen,
        rejected,
        ref_chosen_logprobs=ref_chosen,
        ref_rejected_logprobs=ref_rejected,
        weights=torch.full_like(chosen, 1 / (of or len(pairs))),
        kind=kind,
        beta=beta,
        flip_probability=flips,
    )


def slow(pair: tuple[float, float, float, float], kind: str, flips: float, beta: float) -> float:
    h = (pair[0] - pair[1]) - (pair[2] - pair[3])

    def against(x: float) -> float:  # -log sigma(x), from either side without overflow
        return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x

    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if kind == "robust":
        return ((1 - flips) * against(beta * h) - flips * against(-beta * h)) / (1 - 2 * flips)
    return (1 - flips) * against(beta * h) + flips * against(-beta * h)


@pytest.mark.parametrize("name", ["V10_dpo_beta_0.1", "V10_dpo_beta_0.5"])
def test_v10_losses_rewards_and_gradients(vectors, name: str):
    v = vectors[name]
    pair = [[v["pi_w"], v["pi_l"], v["ref_w"], v["ref_l"]]]
    for (kind, flips), key in zip(FORMS, ("loss", "cdpo_eps0p1", "robust_eps0p1", "ipo"), strict=True):
        close(run(pair, kind, flips, v["beta"])[0], v[key])
    leaves = [t64([value]).requires_grad_() for value in pair[0]]
    loss, diagnostics = dpo.loss(
        *leaves[:2],
        ref_chosen_logprobs=leaves[2],
        ref_rejected_logprobs=leaves[3],
        weights=t64([1.0]),
        kind="dpo",
        beta=v["beta"],
        flip_probability=0.0,
    )
    loss.backward()
    close(leaves[0].grad, [v["grad_pi_w"]])
    close(leaves[1].grad, [v["grad_pi_l"]])
    assert leaves[2].grad is None
    assert leaves[3].grad is None
    close(dpo.implicit_rewards(t64([v["pi_w"]]), t64([v["ref_w"]]), beta=v["beta"]), [v["reward_w"]])
    close(dpo.implicit_rewards(t64([v["pi_l"]]), t64([v["ref_l"]]), beta=v["beta"]), [v["reward_l"]])
    close(diagnostics["reward_gap"], v["beta"] * v["h"])
    assert diagnostics["accuracy"] == 1
    close(diagnostics["chosen_logprobs_mean"], v["pi_w"])
    close(diagnostics["rejected_logprobs_mean"], v["pi_l"])


def test_i5_v10b_at_the_reference(vectors):
    chosen, rejected = t64([-12.0]).requires_grad_(), t64([-15.0]).requires_grad_()
    loss, _ = dpo.loss(
        chosen,
        rejected,
        ref_chosen_logprobs=chosen.detach(),
        ref_rejected_logprobs=rejected.detach(),
        weights=t64([1.0]),
        kind="dpo",
        beta=0.1,
        flip_probability=0.0,
    )
    loss.backward()
    close(loss, vectors["V10b_dpo_at_init"]["loss"])
    close(chosen.grad, [-0.1 / 2])


def test_v22_the_implicit_reward_of_the_optimal_policy(vectors):
    v = vectors["V22_kl_optimal"]
    found = dpo.implicit_rewards(t64(v["pi_star"]).log(), t64(v["pi0"]).log(), beta=v["beta"])
    close(found, v["dpo_implicit"], atol=2e-7)
    close(found - t64(v["reward"]), v["implicit_minus_reward"], atol=2e-7)
    # What the tilt is divided by, and what the optimum is worth: reward less KL.
    pi, ref, beta = t64(v["pi_star"]), t64(v["pi0"]), v["beta"]
    close((ref * (t64(v["reward"]) / beta).exp()).sum(), v["Z"])
    close((pi * t64(v["reward"])).sum() - beta * exact(pi.log(), ref.log()), v["J"], atol=2e-8)
    close(beta * math.log(v["Z"]), v["beta_logZ"])
    # At the optimum the loss of every pair is that of its true rewards: -log sigma(r_w - r_l).
    for w, x in ((2, 0), (2, 1), (1, 0)):
        pi, ref = t64(v["pi_star"]).log(), t64(v["pi0"]).log()
        loss, _ = run([[pi[w], pi[x], ref[w], ref[x]]], "dpo", 0.0, v["beta"])
        close(loss, math.log1p(math.exp(v["reward"][x] - v["reward"][w])), atol=2e-7)


@pytest.mark.parametrize(("kind", "flips"), FORMS)
@given(pairs=PAIRS, beta=st.floats(0.05, 1.0))
def test_the_loss_equals_a_slow_loop(kind: str, flips: float, pairs: list, beta: float):
    loss, diagnostics = run(pairs, kind, flips, beta)
    close(loss, sum(slow(pair, kind, flips, beta) for pair in pairs) / len(pairs))
    close(diagnostics["accuracy"], sum((w - x) - (rw - rx) > 0 for w, x, rw, rx in pairs) / len(pairs))


@pytest.mark.parametrize(("kind", "flips"), FORMS)
def test_gradcheck(kind: str, flips: float):
    chosen, rejected = t64([-3.0, -9.0, -4.0]).requires_grad_(), t64([-5.0, -2.0, -4.0]).requires_grad_()
    reference = {"ref_chosen_logprobs": t64([-3.5, -8.0, -4.0]), "ref_rejected_logprobs": t64([-4.0, -3.0, -5.0])}
    options = {"weights": t64([0.2, 0.5, 0.3]), "kind": kind, "beta": 0.3, "flip_probability": flips}
    assert torch.autograd.gradcheck(lambda w, x: dpo.loss(w, x, **reference, **options)[0], (chosen, rejected))


@given(pairs=PAIRS, beta=st.floats(0.05, 1.0))
def test_i18_swapping_the_sides_negates_h(pairs: list, beta: float):
    loss, diagnostics = run(pairs, "dpo", 0.0, beta)
    swapped, others = run([[x, w, rx, rw] for w, x, rw, rx in pairs], "dpo", 0.0, beta)
    close(others["reward_gap"], -diagnostics["reward_gap"])
    close(swapped, loss + diagnostics["reward_gap"])


@pytest.mark.parametrize(("kind", "flips"), FORMS)
@given(pairs=PAIRS, data=st.data())
def test_i2_i3_neither_order_nor_splits_matter(kind: str, flips: float, pairs: list, data: st.DataObject):
    whole, figures = run(pairs, kind, flips)
    shuffled = data.draw(st.permutations(pairs))
    cut = data.draw(st.integers(0, len(pairs)))
    parts = [run(part, kind, flips, of=len(pairs)) for part in (shuffled[:cut], shuffled[cut:])]
    close(parts[0][0] + parts[1][0], whole)
    for name, total in figures.items():
        close(parts[0][1][name] + parts[1][1][name], total)


@given(pairs=PAIRS)
def test_robust_undoes_in_expectation_what_flips_do(pairs: list):
    flips = 0.2
    flipped = [[x, w, rx, rw] for w, x, rw, rx in pairs]
    expectation = (1 - flips) * run(pairs, "robust", flips)[0] + flips * run(flipped, "robust", flips)[0]
    close(expectation, run(pairs, "dpo", 0.0)[0])
    assert run(pairs, "cdpo", 0.0)[0] == run(pairs, "dpo", 0.0)[0]


@given(batch=batches(), num_columns=st.integers(0, 3), garbage=garbage_values)
def test_i18_only_response_tokens_enter_and_they_are_summed(batch: Batch, num_columns: int, garbage: float):
    expected = [
        sum(value for value, kept in zip(values, mask, strict=True) if kept)
        for values, mask in zip(batch.logprobs.tolist(), batch.mask.tolist(), strict=True)
    ]
    wider = batch.padded(num_columns, garbage).requiring_grad()
    found = dpo.response_logprobs(wider.logprobs, wider.mask)
    close(found, expected)
    found.sum().backward()
    close(wider.logprobs.grad, wider.mask.double())


def test_an_absurd_ratio_stays_finite():
    assert run([[-5000.0, -1.0, -1.0, -5000.0]], "dpo", 0.0, beta=1.0)[0].item() == pytest.approx(9998)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"flip_probability": 0.1}, "dpo takes labels as they are"),
        ({"kind": "ipo", "flip_probability": 0.1}, "ipo takes labels as they are"),
        ({"kind": "robust", "flip_probability": 0.5}, "below 1/2"),
        ({"weights": torch.ones(3)}, "weights must be like"),
        ({"ref_chosen_logprobs": torch.ones(2, 1)}, "ref_chosen_logprobs must have rank 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, says: str):
    settings = {"weights": torch.ones(2), "kind": "dpo", "beta": 0.1, "flip_probability": 0.0}
    tensors = {name: torch.zeros(2) for name in NAMES}
    with pytest.raises(ValueError, match=says):
        dpo.loss(**(tensors | settings | changes))
