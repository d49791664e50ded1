"""KL estimators, the KL per sequence, and the controllers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, make_batch, t64

from configs.kl import KLControllerConfig
from learner.ops import kl
from learner.ops.aggregate import token_weights
from learner.ops.kl import AdaptiveKLController, FixedKLController, SequenceKL

ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3, "k3+": kl.k3_plus}


@pytest.mark.parametrize(("name", "expectation"), [("k1", "E_k1"), ("k2", "E_k2"), ("k3", "E_k3")])
def test_v1_estimates_and_their_expectations(vectors, name: str, expectation: str):
    v = vectors["V1_kl"]
    pi, ref = t64(v["pi"]), t64(v["ref"])
    estimate = ESTIMATORS[name](pi.log(), ref.log())
    close(estimate, v[name])
    close((pi * estimate).sum(), v[expectation])
    if name == "k1":
        close(estimate, v["log_ratio"])


def swapped_k3(pi: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """exp(lr) - 1 - lr: k3 with the log-ratio the wrong way round, which trlX calls KL."""
    return pi / ref - 1 - (pi / ref).log()


def test_v1_k1_and_k3_are_unbiased_and_k3_is_not_the_swapped_one(vectors):
    v = vectors["V1_kl"]
    pi, ref = t64(v["pi"]), t64(v["ref"])
    close((pi * kl.k1(pi.log(), ref.log())).sum(), v["exact_KL_pi_ref"])
    close((pi * kl.k3(pi.log(), ref.log())).sum(), v["exact_KL_pi_ref"])
    close(swapped_k3(pi, ref), v["k3_trlx_swapped"])
    assert (kl.k3(pi.log(), ref.log()) - t64(v["k3_trlx_swapped"])).abs().max() > 1e-3
    # The swapped one estimates the chi-squared divergence less the KL, and not the KL.
    close((pi * swapped_k3(pi, ref)).sum(), v["E_trlx"])
    close((pi * (pi / ref - 1)).sum(), v["chi2_pi_ref"])
    close(v["chi2_pi_ref"] - kl.exact(pi.log(), ref.log()), v["chi2_minus_KL"])
    assert abs((pi * kl.k3(pi.log(), ref.log())).sum() - v["E_trlx"]) > 5e-4


def test_v1b_far_from_the_reference(vectors):
    v = vectors["V1b_kl_far"]
    pi, ref = t64(v["pi"]), t64(v["ref"])
    close((pi * kl.k1(pi.log(), ref.log())).sum(), v["exact_KL"])
    close((pi * kl.k2(pi.log(), ref.log())).sum(), v["E_k2"])
    close((pi * kl.k3(pi.log(), ref.log())).sum(), v["E_k3"])
    close((pi * swapped_k3(pi, ref)).sum(), v["E_trlx"])
    assert v["exact_KL"] - v["E_trlx"] > 0.05


@pytest.mark.parametrize(
    ("name", "key"), [("k1", "E_grad_k1_as_loss"), ("k2", "E_grad_k2_as_loss"), ("k3", "E_grad_k3_as_loss")]
)
def test_v1c_expected_gradients_as_losses(vectors, name: str, key: str):
    v = vectors["V1_kl"]
    pi, ref = t64(v["pi"]), t64(v["ref"])
    logits = pi.log().requires_grad_()
    (pi * ESTIMATORS[name](logits.log_softmax(0), ref.log())).sum().backward()
    close(logits.grad, vectors["V1c_kl_grads"][key])


def test_v1c_k3_as_a_loss_pulls_as_the_kl_the_other_way_round(vectors):
    v = vectors["V1_kl"]
    logits = t64(v["pi"]).log().requires_grad_()
    kl.exact(t64(v["ref"]).log(), logits).backward()
    close(logits.grad, vectors["V1c_kl_grads"]["grad_KL_ref_pi"])


def test_v1c_straight_through_has_the_value_of_k3_and_the_exact_gradient(vectors):
    v = vectors["V1_kl"]
    pi, ref = t64(v["pi"]), t64(v["ref"])
    logits = pi.log().requires_grad_()
    expected = (pi * kl.k3_plus(logits.log_softmax(0), ref.log())).sum()
    expected.backward()
    close(expected, v["exact_KL_pi_ref"])
    assert logits.grad.tolist() == pytest.approx([0.09894, -0.09388, -0.00505], abs=5e-6)
    close(logits.grad, vectors["V1c_kl_grads"]["exact_grad_KL_pi_ref"])
    assert torch.equal(kl.k3_plus(pi.log(), ref.log()), kl.k3(pi.log(), ref.log()))  # to the last bit


def score_function_gradient(logits: torch.Tensor, ref: torch.Tensor, name: str) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    penalty = ESTIMATORS[name](logprobs, ref.log()).detach()
    (logprobs.exp().detach() * penalty * logprobs).sum().backward()
    return logits.grad


def test_v1d_k1_in_the_reward_has_the_gradient_of_the_kl(vectors):
    v = vectors["V1d_reward_k1_score_grad"]
    close(score_function_gradient(t64(v["z"]), t64(v["pi_ref"]), "k1"), v["grad"])
    logits = t64(v["z"]).requires_grad_()
    kl.exact(logits, t64(v["pi_ref"]).log()).backward()
    close(logits.grad, v["exact_grad_KL"])


@pytest.mark.parametrize(("name", "key"), [("k1", "score_grad_k1"), ("k2", "score_grad_k2"), ("k3", "score_grad_k3")])
def test_v1e_only_k1_works_in_the_reward(vectors, name: str, key: str):
    v = vectors["V1e_k2_k3_as_reward"]
    close(score_function_gradient(t64(v["pi"]).log(), t64(v["ref"]), name), v[key])


def test_v1e_in_the_reward_k3_pulls_both_ways_at_once(vectors):
    v = vectors["V1e_k2_k3_as_reward"]
    logits, ref = t64(v["pi"]).log().requires_grad_(), t64(v["ref"]).log()
    (kl.exact(logits, ref) - kl.exact(ref, logits)).backward()
    close(logits.grad, v["gradKL_pi_ref_minus_gradKL_ref_pi"])


@given(st.floats(-60, 60), st.floats(-60, 60))
def test_estimates_equal_a_slow_computation_with_the_exponent_clamped(logprob: float, ref_logprob: float):
    lr = logprob - ref_logprob
    close(kl.k1(t64(logprob), t64(ref_logprob)), lr)
    close(kl.k2(t64(logprob), t64(ref_logprob)), lr * lr / 2)
    estimate = kl.k3(t64(logprob), t64(ref_logprob)).item()
    assert estimate == pytest.approx(math.exp(min(max(-lr, -20), 20)) - 1 + lr, rel=1e-9, abs=1e-9)
    assert estimate >= 0


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=5))
def test_i5_every_estimate_is_zero_at_the_reference(logprobs: list[float]):
    for estimator in ESTIMATORS.values():
        assert (estimator(t64(logprobs), t64(logprobs)) == 0).all()


def test_v1_the_exact_kl_and_its_gradient(vectors):
    v = vectors["V1_kl"]
    logits = t64(v["pi"]).log().requires_grad_()
    found = kl.exact(logits, t64(v["ref"]).log())
    found.backward()
    close(found, v["exact_KL_pi_ref"])
    close(kl.exact(t64(v["ref"]).log(), logits), v["exact_KL_ref_pi"])
    close(logits.grad, vectors["V1c_kl_grads"]["exact_grad_KL_pi_ref"])
    far = vectors["V1b_kl_far"]
    close(kl.exact(t64(far["pi"]).log(), t64(far["ref"]).log()), far["exact_KL"])


@given(batches(), st.floats(0.3, 2))
def test_the_exact_kl_equals_a_slow_loop_at_any_temperature(batch: Batch, temperature: float):
    """Rows of a random batch stand for the logits of states."""
    mine, theirs = (torch.where(batch.mask, x, 0.0) for x in (batch.logprobs, batch.ref_logprobs))
    found = kl.exact(mine, theirs, temperature=temperature)
    for row in range(len(mine)):
        p, q = ([math.exp(x / temperature) for x in logits[row].tolist()] for logits in (mine, theirs))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        close(found[row], sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    close(kl.exact(mine, mine + 3.0), torch.zeros(len(mine)))


def test_a_token_that_the_policy_cannot_produce_costs_nothing():
    close(kl.exact(t64([0.0, -math.inf]), t64([0.0, 0.0])), math.log(2))
    close(kl.exact(t64([0.0, -math.inf]), t64([0.0, -math.inf])), 0.0)


@pytest.mark.parametrize("name", ["k2", "k3", "k3+"])
@given(batch=batches())
def test_the_penalty_of_a_loss_equals_a_slow_loop(name: str, batch: Batch):
    num_tokens = int(batch.mask.sum())
    expected, slopes = 0.0, torch.zeros_like(batch.logprobs)
    for row, t in batch.mask.nonzero().tolist():
        lr = (batch.logprobs[row, t] - batch.ref_logprobs[row, t]).item()
        expected += (lr * lr / 2 if name == "k2" else math.exp(-lr) - 1 + lr) / num_tokens
        slopes[row, t] = (1 - math.exp(-lr) if name == "k3" else lr) / num_tokens
    logprobs, ref = batch.logprobs.clone().requires_grad_(), batch.ref_logprobs.clone().requires_grad_()
    weights = token_weights(batch.mask, mode="token_mean", dtype=torch.float64)
    found = kl.penalty(logprobs, ref_logprobs=ref, weights=weights, estimator=name)
    found.backward()
    close(found, expected)
    close(logprobs.grad, slopes)
    assert ref.grad is None


def test_gradcheck_of_the_penalty():
    batch = make_batch([3, 1, 4], seed=4)
    weights = token_weights(batch.mask, mode="seq_mean_token_sum", dtype=torch.float64)
    for name in ("k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda x, name=name: kl.penalty(x, ref_logprobs=batch.ref_logprobs, weights=weights, estimator=name),
            batch.logprobs.clone().requires_grad_(),
        )


def test_k1_is_no_loss():
    with pytest.raises(ValueError, match="expected gradient of zero"):
        kl.penalty(t64([0.0]), ref_logprobs=t64([0.0]), weights=t64([1.0]), estimator="k1")


def test_clamped_exponents_are_counted():
    mask = torch.tensor([[True, True, True, False]])
    assert kl.count_clamped(t64([[0, -25, -20, -99]]), t64([[0, 0, 0, 0]]), mask=mask).item() == 1


def test_v2_the_kl_is_per_sequence(vectors):
    v = vectors["V2_reward"]
    logprobs, ref, mask = t64(v["logp"]), t64(v["ref_logp"]), t64(v["mask"]).bool()
    found = kl.kl_per_sequence(logprobs, ref, mask=mask)
    assert found.num_sequences == 2
    close(found.nats, v["metric_mean_seq_kl"])
    for row, nats in enumerate(v["kl_seq"]):
        only = slice(row, row + 1)
        close(kl.kl_per_sequence(logprobs[only], ref[only], mask=mask[only]).nats, nats)
    # Neither the mean over tokens nor the one that counts padding as tokens too.
    per_token = kl.k1(logprobs, ref)
    close(per_token[mask].mean(), v["metric_mean_token_kl"])
    close(torch.where(mask, per_token, 0).mean(), v["metric_mean_incl_pad"])
    assert min(abs(found.nats - v[key]) for key in ("metric_mean_token_kl", "metric_mean_incl_pad")) > 0.1


@given(batches(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_i2_padding_and_row_order_do_not_change_the_kl(batch: Batch, num_columns: int, random):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    expected = 0.0
    for row, keep in enumerate(batch.mask.sum(dim=1).tolist()):
        for t in range(keep):
            expected += (batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]).item() / len(batch.mask)
    other = batch.padded(num_columns, float("nan")).rows(order)
    found = kl.kl_per_sequence(other.old_logprobs, other.ref_logprobs, mask=other.mask)
    close(found.nats, expected)
    assert found.num_sequences == len(batch.mask)


@given(batches(min_rows=2))
def test_i3_the_kl_of_parts_pools_to_that_of_the_batch(batch: Batch):
    parts = [batch.rows([0]), batch.rows(list(range(1, len(batch.mask))))]
    pooled = kl.pool([kl.kl_per_sequence(p.old_logprobs, p.ref_logprobs, mask=p.mask) for p in parts])
    whole = kl.kl_per_sequence(batch.old_logprobs, batch.ref_logprobs, mask=batch.mask)
    close(pooled.nats, whole.nats)
    assert pooled.num_sequences == whole.num_sequences


def test_rows_without_tokens_do_not_dilute_the_kl():
    mask = torch.tensor([[True, True], [False, False]])
    found = kl.kl_per_sequence(t64([[1.0, 2.0], [0.0, 0.0]]), t64([[0.0, 0.0], [0.0, 0.0]]), mask=mask)
    assert found == SequenceKL(nats=3.0, num_sequences=1)


def test_a_kl_of_nothing_is_refused():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="no row has a response token"):
        kl.kl_per_sequence(zeros, zeros, mask=zeros.bool())
    with pytest.raises(ValueError, match="no parts"):
        kl.pool([])


def adaptive(beta: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> AdaptiveKLController:
    config = KLControllerConfig(kind="adaptive", target_nats_per_sequence=target, horizon_episodes=horizon)
    controller = kl.make_controller(config, initial_beta=beta)
    assert isinstance(controller, AdaptiveKLController)
    return controller


def test_v7_trace_of_the_adaptive_controller(vectors):
    v = vectors["V7_adaptive_kl"]
    controller = adaptive(v["init"], v["target"], v["horizon"])
    for nats, _, beta in v["trace_current_err_beta"]:
        controller.update(SequenceKL(nats=nats, num_sequences=v["n_steps"]))
        close(controller.beta, beta)


@pytest.mark.parametrize(("key", "num_sequences"), [("apa_repo_decay_floor_125M", 8), ("apa_repo_decay_6B_bs2", 2)])
def test_v7_fed_a_kl_per_token_the_coefficient_can_only_decay(vectors, key: str, num_sequences: int):
    """A token's KL never reaches a target meant for a sequence: each of 10,000 updates takes the largest step down."""
    v = vectors["V7_adaptive_kl"]
    fed, meant = adaptive(0.05, v["target"], v["horizon"]), adaptive(0.05, v["target"], v["horizon"])
    for _ in range(10_000):
        fed.update(SequenceKL(nats=0.1, num_sequences=num_sequences))
        meant.update(SequenceKL(nats=0.1 * 128, num_sequences=num_sequences))
    close(fed.beta, v[key])
    # The same tokens summed over responses of 128, as the type has it: too far from the reference, so it rises.
    assert meant.beta > 0.05


def test_v7b_the_doubling_controller(vectors):
    v = vectors["V7b_ppo_paper_controller"]
    config = KLControllerConfig(kind="doubling", target_nats_per_sequence=v["d_target"])
    for nats, before, after in v["cases"]:
        controller = kl.make_controller(config, initial_beta=before)
        controller.update(SequenceKL(nats=nats, num_sequences=64))
        assert controller.beta == after


def test_i10_the_target_is_a_fixed_point():
    controller = adaptive()
    controller.update(SequenceKL(nats=6.0, num_sequences=512))
    assert controller.beta == 0.2


@given(st.floats(-1e6, 1e6), st.integers(1, 49_999))
def test_i10_one_step_is_bounded_and_the_coefficient_stays_positive(nats: float, num_sequences: int):
    controller = adaptive()
    controller.update(SequenceKL(nats=nats, num_sequences=num_sequences))
    assert abs(controller.beta / 0.2 - 1) <= 0.2 * num_sequences / 10_000 + 1e-12
    assert controller.beta > 0
    assert (controller.beta - 0.2) * (nats - 6.0) >= 0


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "doubling"])
@pytest.mark.parametrize("not_per_sequence", [6.0, 6, torch.tensor(6.0), None])
def test_i10_a_kl_without_its_type_is_refused(kind: str, not_per_sequence: object):
    controller = kl.make_controller(KLControllerConfig(kind=kind), initial_beta=0.1)
    with pytest.raises(TypeError, match="takes a SequenceKL"):
        controller.update(not_per_sequence)


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "doubling"])
def test_a_kl_that_is_not_finite_is_refused(kind: str):
    controller = kl.make_controller(KLControllerConfig(kind=kind), initial_beta=0.1)
    with pytest.raises(ValueError, match="finite"):
        controller.update(SequenceKL(nats=math.nan, num_sequences=3))
    assert controller.beta == 0.1


def test_a_batch_that_could_turn_the_coefficient_negative_is_refused():
    with pytest.raises(ValueError, match="horizon must exceed"):
        adaptive(horizon=100).update(SequenceKL(nats=1.0, num_sequences=500))


def test_the_fixed_controller_stays_and_may_be_zero():
    controller = kl.make_controller(KLControllerConfig(), initial_beta=0.0)
    controller.update(SequenceKL(nats=50.0, num_sequences=512))
    assert type(controller) is FixedKLController
    assert controller.beta == 0.0


def test_the_state_of_a_controller_is_plain_and_comes_back():
    controller = adaptive()
    controller.update(SequenceKL(nats=12.0, num_sequences=256))
    state = controller.state_dict()
    assert {key: type(value) for key, value in state.items()} == {"beta": float}
    other = adaptive(beta=9.0)
    other.load_state_dict(state)
    assert other.beta == controller.beta


@pytest.mark.parametrize("state", [{}, {"beta": -1.0}, {"beta": math.inf}, {"beta": 0.0}])
def test_a_senseless_state_is_refused(state: dict[str, float]):
    with pytest.raises(ValueError, match="KL coefficient"):
        adaptive().load_state_dict(state)
