"""The forms of over-optimisation: peaks, zeros, and coefficients found again from noisy curves."""

import math

import numpy as np
import pytest

from benchmarks.experiments.overoptimization_forms import Curve, bootstrap, extrapolate, fit, regressional_slope
from tests.reference_vectors import VECTORS

V20 = VECTORS["V20_gao"]
BEST_OF_N = Curve(form="best_of_n", a=V20["alpha_bon"], b=V20["beta_bon"])
RL = Curve(form="rl", a=V20["alpha_rl"], b=V20["beta_rl"])


def noisy(curve: Curve, seed: int, *, furthest: float = 8.0, noise: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    d = np.linspace(0.05, furthest, 80)
    return d, curve.at(d) + noise * np.random.default_rng(seed).standard_normal(80)


def test_v20_peaks_and_zeros() -> None:
    assert BEST_OF_N.peak == pytest.approx((V20["d_peak_bon"], V20["R_peak_bon"]), abs=1e-8)
    assert RL.peak == pytest.approx((V20["d_peak_rl"], V20["R_peak_rl"]), abs=1e-8)
    assert RL.zero == pytest.approx(V20["d_zero_rl"], abs=1e-8)
    assert BEST_OF_N.zero == pytest.approx(1 / 0.12)
    for curve in (BEST_OF_N, RL):
        assert curve.peak is not None
        assert curve.zero is not None
        d = np.linspace(0.01, 10, 100_000)
        scores = curve.at(d)
        assert d[scores.argmax()] == pytest.approx(curve.peak[0], abs=1e-3)
        assert scores.max() == pytest.approx(curve.peak[1], abs=1e-6)
        assert curve.at(np.array([curve.zero]))[0] == pytest.approx(0, abs=1e-12)


def test_the_forms_are_what_they_say() -> None:
    assert BEST_OF_N.at(np.array([2.0])).tolist() == pytest.approx([2 * (1 - 0.12 * 2)])
    assert RL.at(np.array([2.0])).tolist() == pytest.approx([2 * (1 - 0.45 * math.log(2))])


@pytest.mark.parametrize("curve", [BEST_OF_N, RL])
def test_v20_the_coefficients_are_found_again_to_a_percent(curve: Curve) -> None:
    found = fit(*noisy(curve, 3), form=curve.form)
    assert found.a == pytest.approx(curve.a, rel=0.01)
    assert found.b == pytest.approx(curve.b, rel=0.01)


def test_what_is_near_the_start_is_left_out() -> None:
    d, scores = noisy(RL, 1, noise=0.0)
    scores[d <= 0.3] += 100
    assert fit(d, scores, form="rl").a == pytest.approx(RL.a)
    with pytest.raises(ValueError, match="two different distances beyond 0.3"):
        fit(np.array([0.1, 0.2, 5.0, 5.0]), np.zeros(4), form="rl")


@pytest.mark.parametrize("curve", [BEST_OF_N, RL])
def test_half_a_curve_tells_the_rest_to_the_right_form_alone(curve: Curve) -> None:
    d, scores = noisy(curve, 5)
    right = extrapolate(d, scores, form=curve.form)
    wrong = extrapolate(d, scores, form="rl" if curve.form == "best_of_n" else "best_of_n")
    assert right.rmse < 0.01 < wrong.rmse
    assert right.rmse < 0.1 * right.rmse_of_last_value
    assert right.fitted_up_to <= 4.0
    assert right.num_predicted == int((d > 4.0).sum())
    with pytest.raises(ValueError, match="nothing is left to predict"):
        extrapolate(d, scores, form="rl", share=1.0)


def test_without_a_bend_there_is_no_peak() -> None:
    d = np.linspace(0.4, 5, 30)
    for form in ("best_of_n", "rl"):
        straight = fit(d, 2 * d - 1e-9 * d, form=form)
        assert straight.a == pytest.approx(2)
        assert Curve(form=form, a=2.0, b=0.0).peak is None
        assert Curve(form=form, a=2.0, b=-0.1).zero is None


def test_intervals_are_over_seeds() -> None:
    curves = [noisy(Curve(form="rl", a=1 + 0.1 * k, b=0.45), k + 2) for k in (-2, -1, 0, 1, 2)]
    (low, high), (bend_low, bend_high) = bootstrap(curves, form="rl", resamples=300, confidence=0.9, seed=0)
    assert 0.8 < low < 1 < high < 1.2
    assert bend_high - bend_low < 0.01
    one = bootstrap(curves[:1], form="rl", resamples=10, confidence=0.9, seed=0)
    assert one[0][0] == one[0][1]


def test_v20b_noise_alone_only_flattens() -> None:
    v = VECTORS["V20b_regressional"]
    slope = regressional_slope(gold_variance=v["varX"], noise_variance=v["varZ"])
    assert slope == pytest.approx(v["slope"])
    rng = np.random.default_rng(0)
    gold = rng.standard_normal(400_000)
    proxy = gold + math.sqrt(v["varZ"]) * rng.standard_normal(400_000)
    assert np.polyfit(proxy, gold, 1)[0] == pytest.approx(slope, abs=0.01)
