"""The pairwise loss of reward models, and calibration."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import close, t64

from learner.ops.reward_model import calibration, pairwise_loss

SCORES = st.floats(-8, 8)
PAIRS = st.lists(st.tuples(SCORES, SCORES, st.floats(0, 3)), min_size=1, max_size=6)


def run(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None = None, centering: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = torch.full_like(chosen, 1 / len(chosen))
    return pairwise_loss(chosen, rejected, weights=weights, margins=margins, centering_coefficient=centering)


def test_v11_loss_accuracy_and_gradient(vectors):
    v = vectors["V11_rm_pair"]
    chosen = t64(v["chosen"]).requires_grad_()
    loss, diagnostics = run(chosen, t64(v["rejected"]))
    loss.backward()
    close(loss, v["loss"])
    close(diagnostics["accuracy"], v["acc"])
    close(diagnostics["score_gap_mean"], (1.0 - 0.3 + 1.0) / 3)
    close(diagnostics["score_mean"], (1.0 + 0.7 - 2.0) / 6)
    close(chosen.grad, v["grad_chosen_per_pair"])
    for i, expected in enumerate(v["loss_each"]):
        close(run(t64(v["chosen"])[i : i + 1], t64(v["rejected"])[i : i + 1])[0], expected)


@pytest.mark.parametrize("name", ["V11b_margin_large", "V11b_margin_small"])
def test_v11b_margin_and_centering(vectors, name: str):
    v, pair = vectors[name], vectors["V11_rm_pair"]
    chosen, rejected, margins = t64(pair["chosen"]), t64(pair["rejected"]), t64(v["margin"])
    close(run(chosen, rejected, margins)[0], v["loss"], atol=2e-8)
    close(run(chosen, rejected, margins, centering=0.01)[0], v["loss_center_1e_2"], atol=2e-8)
    for i, expected in enumerate(v["loss_each"]):
        close(run(chosen[i : i + 1], rejected[i : i + 1], margins[i : i + 1])[0], expected, atol=2e-8)


def test_v11d_the_weights_decide_between_prompts_and_pairs(vectors):
    v = vectors["V11d_grouping"]
    pairs = list(itertools.combinations(vectors["V11c_kwise"]["scores_best_to_worst"], 2))
    # The second prompt has a single pair, 0.3 apart: -log sigma(0.3) is the vector's 0.55435524.
    chosen, rejected = t64([w for w, _ in pairs] + [0.5]), t64([x for _, x in pairs] + [0.2])
    close(run(chosen[:6], rejected[:6])[0], v["prompt_mean_losses"][0])
    close(run(chosen[6:], rejected[6:])[0], v["prompt_mean_losses"][1])
    close(run(chosen, rejected)[0], v["mean_over_pairs"])
    close(pairwise_loss(chosen, rejected, weights=t64([1 / 12] * 6 + [1 / 2]))[0], v["mean_over_prompts"])


@given(PAIRS, st.floats(0, 0.5))
def test_the_loss_equals_a_slow_loop(pairs: list[tuple[float, float, float]], centering: float):
    expected = sum(math.log1p(math.exp(-(w - x - m))) + centering * (w + x) ** 2 for w, x, m in pairs) / len(pairs)
    chosen, rejected, margins = (t64([pair[i] for pair in pairs]) for i in range(3))
    loss, diagnostics = run(chosen, rejected, margins, centering)
    close(loss, expected)
    close(diagnostics["accuracy"], sum(w > x for w, x, _ in pairs) / len(pairs))


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_gradcheck(centering: float):
    chosen = t64([0.3, -1.0, 2.0]).requires_grad_()
    rejected = t64([0.1, 0.5, -2.0]).requires_grad_()
    margins = t64([1.0, 0.0, 3.0])
    assert torch.autograd.gradcheck(lambda w, x: run(w, x, margins, centering)[0], (chosen, rejected))


@given(PAIRS, st.floats(-5, 5))
def test_i13_a_constant_per_prompt_changes_nothing_but_the_centering(pairs: list, shift: float):
    chosen, rejected, margins = (t64([pair[i] for pair in pairs]) for i in range(3))
    close(run(chosen + shift, rejected + shift)[0], run(chosen, rejected)[0])
    close(run(chosen + shift, rejected + shift, margins)[0], run(chosen, rejected, margins)[0])


def test_i13_centering_is_not_invariant():
    chosen, rejected = t64([1.0]), t64([-1.0])
    assert run(chosen + 1, rejected + 1, centering=0.1)[0] > run(chosen, rejected, centering=0.1)[0]


@given(PAIRS, st.data())
def test_i3_splits_add_up(pairs: list, data: st.DataObject):
    cut = data.draw(st.integers(0, len(pairs)))
    chosen, rejected, margins = (t64([pair[i] for pair in pairs]) for i in range(3))
    weights = torch.full_like(chosen, 1 / len(pairs))
    whole, whole_diagnostics = run(chosen, rejected, margins, 0.01)
    parts = [
        pairwise_loss(
            chosen[part], rejected[part], weights=weights[part], margins=margins[part], centering_coefficient=0.01
        )
        for part in (slice(0, cut), slice(cut, None))
    ]
    close(parts[0][0] + parts[1][0], whole)
    for key, total in whole_diagnostics.items():
        close(parts[0][1][key] + parts[1][1][key], total)


def test_a_large_gap_the_wrong_way_stays_finite():
    assert run(t64([-500.0]), t64([500.0]))[0].item() == 1000.0


def test_a_tie_is_not_accurate():
    assert run(t64([1.0]), t64([1.0]))[1]["accuracy"].item() == 0


def test_v12_gain_and_bias_to_unit(vectors):
    v = vectors["V12_rm_bias"]
    gain, bias = calibration(t64(v["demo_scores"]))
    close(gain, v["gain_bias_to_unit"]["gain"])
    close(bias, v["gain_bias_to_unit"]["bias"])
    close([gain * s + bias for s in v["demo_scores"]], v["gain_bias_to_unit"]["out"], atol=2e-8)
    # Dividing the bias by the gain gives back the plain mean that InstructGPT subtracts.
    close(-bias / gain, v["bias"])


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20).filter(lambda s: max(s) - min(s) > 0.1))
def test_i15_calibrated_scores_have_mean_zero_and_deviation_one_and_keep_their_order(scores: list[float]):
    gain, bias = calibration(torch.tensor(scores))
    calibrated = [gain * s + bias for s in scores]
    mean = sum(calibrated) / len(scores)
    assert abs(mean) < 1e-4
    assert abs(sum((c - mean) ** 2 for c in calibrated) / len(scores) - 1) < 1e-4
    assert gain > 0


@pytest.mark.parametrize("scores", [[1.0], [0.3, 0.3, 0.3], [0.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_scores_that_cannot_be_calibrated_are_refused(scores: list[float]):
    with pytest.raises(ValueError, match="calibration needs"):
        calibration(torch.tensor(scores))


@pytest.mark.parametrize("options", [{"weights": torch.ones(3)}, {"weights": torch.ones(2), "margins": torch.ones(3)}])
def test_unlike_tensors_are_refused(options: dict):
    with pytest.raises(ValueError, match="must be like chosen_scores"):
        pairwise_loss(torch.ones(2), torch.ones(2), **options)
