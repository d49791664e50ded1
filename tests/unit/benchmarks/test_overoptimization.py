"""Over-optimisation: best of n from a pool by hand, peaks and prices, and verdicts on curves made by hand."""

import itertools
import math

import numpy as np
import pytest

from benchmarks.experiments.laboratory.plan import FULL, SLICE
from benchmarks.experiments.laboratory.pool import best_of_n, file_of, one_of_each
from benchmarks.experiments.laboratory.verdicts import Curve
from benchmarks.experiments.laboratory.world import RewardSpec, Size
from benchmarks.experiments.overoptimization import claims, fits, peak, peaks, price, specs

SEEDS = (1, 2)
COUNTS = ["helpful-250", "helpful-1000"]
CONTROL = "control-1000"


def rl_curve(a: float, b: float, *, furthest: float = 4.0) -> Curve:
    d = np.linspace(0.0, furthest, 41)
    gold = d * (a - b * np.log(np.maximum(d, 1e-9)))
    return {"kl_exact_nats": d * d, "gold": gold, "proxy": 2 * d}


def pool_curve(a: float, b: float) -> Curve:
    d = np.array([0.0, 0.44, 0.8, 1.1, 1.35, 1.58, 1.78, 1.97, 2.14, 2.29, 2.44])
    gold = d * (a - b * d)
    n = 2.0 ** np.arange(11)
    return {"n": n, "kl_exact_nats": d * d, "gold": gold, "proxy": 2 * d, "heldout_accuracy": np.full(11, 0.9)}


def runs(rl: dict[str, Curve], chosen: Curve) -> dict[str, dict[str, dict[int, Curve]]]:
    return {
        "rl": {name: dict.fromkeys(SEEDS, curve) for name, curve in rl.items()},
        "best of n": {name: dict.fromkeys(SEEDS, chosen) for name in rl},
    }


# Peaks at d = exp(a / b - 1): 1 and 1.65, of height b d: 1 and 1.65; the control only rises.
AS_PUBLISHED = {"helpful-250": rl_curve(1, 1), "helpful-1000": rl_curve(1.5, 1), CONTROL: rl_curve(2, 0)}


def verdicts(rl: dict[str, Curve], chosen: Curve) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in claims(runs(rl, chosen), counts=COUNTS, control=CONTROL)}


def test_best_of_n_is_the_mean_over_all_subsets_of_every_prompt() -> None:
    chosen_by = np.array([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 4.0, 1.0]])
    proxy, gold = chosen_by + 1, np.array([[1.0, -3.0, 4.0, 2.0], [0.0, 2.0, 6.0, 1.0]])
    rows = best_of_n(chosen_by, proxy=proxy, gold=gold)
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert [row["kl_exact_nats"] for row in rows] == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])
    # By hand, n = 2: of the first prompt's six pairs, three go to -3, two to 2, one to 4; of the second's, three go to
    # 0, the tied pair and the two pairs with the last have the mean of 2 and 6.
    assert rows[1]["gold"] == pytest.approx(((3 * -3 + 2 * 2 + 4) / 6 + 3 * 4 / 6) / 2)
    assert rows[2]["gold"] == pytest.approx((-3 + 0) / 2)
    pairs = [max(pair) for row in proxy for pair in itertools.combinations(row, 2)]
    assert rows[1]["proxy"] == pytest.approx(np.mean(pairs))


def test_what_is_chosen_by_may_differ_from_the_proxy() -> None:
    rows = best_of_n(np.array([[1.0, 0.0]]), proxy=np.array([[1.0, 2.0]]), gold=np.array([[7.0, 0.0]]))
    assert (rows[1]["proxy"], rows[1]["gold"]) == (1.0, 7.0)


def test_a_pool_has_one_prompt_of_each_topic_and_style() -> None:
    prompts = one_of_each(5)
    assert len({(int(p[1]) // 3, (int(p[3]) - 24) // 4) for p in prompts}) == len(prompts) == 16
    assert [p.tolist() for p in prompts] == [p.tolist() for p in one_of_each(5)]


def test_files_differ_by_all_that_decides() -> None:
    settings = [(RewardSpec(), 1, Size(), 64), (RewardSpec(), 2, Size(), 64), (RewardSpec(), 1, Size(), 128)]
    settings += [(RewardSpec(draw=1), 1, Size(), 64), (RewardSpec(), 1, SLICE.size, 64)]
    assert len({file_of(spec, seed=seed, size=size, num=num) for spec, seed, size, num in settings}) == 5


def test_proxies_of_the_full_run() -> None:
    assert list(specs(FULL)) == ["helpful-250", "helpful-1000", "helpful-2000", "helpful-8000", "control-8000"]
    assert specs(FULL)["helpful-8000"] == FULL.reward


def test_peak_averages_three_evaluations_of_an_arm_and_none_of_a_pool() -> None:
    arm = {"kl_exact_nats": np.array([0.0, 1, 2, 6, 9]), "gold": np.array([1.0, 2, 6, 2, 0]), "proxy": np.arange(5.0)}
    assert peak(arm) == pytest.approx({"kl_exact_nats": 3.0, "gold_gain": 7 / 3, "proxy_gain": 2.0})
    assert peak(arm | {"n": np.ones(5)}) == {"kl_exact_nats": 2.0, "gold_gain": 5.0, "proxy_gain": 2.0}
    assert price(arm | {"n": np.ones(5)}) == pytest.approx(0.4)
    assert price({"kl_exact_nats": np.arange(4.0), "gold": -np.arange(4.0), "proxy": np.arange(4.0)}) == math.inf


def test_the_published_picture_is_reproduced() -> None:
    # Best of n peaks at d = 1.5 with 2.25: 1 nat a unit; RL with the most labels pays 1.65.
    assert set(verdicts(AS_PUBLISHED, pool_curve(3.0, 1.0)).values()) == {"reproduced"}


def test_a_turning_control_refutes_the_turnover() -> None:
    found = verdicts(AS_PUBLISHED | {CONTROL: rl_curve(1, 1)}, pool_curve(3.0, 1.0))
    assert {name for name, verdict in found.items() if verdict == "not reproduced"} == {"E4"}


def test_a_nonlinear_gold_that_never_turns_refutes_it_too() -> None:
    found = verdicts(AS_PUBLISHED | {"helpful-1000": rl_curve(2, 0)}, pool_curve(3.0, 1.0))
    assert found["E4"] == "not reproduced"


def test_labels_that_buy_nothing_and_dear_best_of_n() -> None:
    swapped = AS_PUBLISHED | {"helpful-250": rl_curve(1.5, 1), "helpful-1000": rl_curve(1, 1)}
    found = verdicts(swapped, pool_curve(0.5, 0.01))
    refuted = {"E5, height", "E5, distance", "E5, first and last", "E6"}
    assert {name for name, verdict in found.items() if verdict == "not reproduced"} == refuted


def test_fits_recover_the_forms_and_leave_short_curves_blank() -> None:
    found = {
        (row["optimiser"], row["proxy_of"], row["form"]): row for row in fits(runs(AS_PUBLISHED, pool_curve(3.0, 1.0)))
    }
    own = found["rl", "helpful-1000", "rl"]
    assert (own["a"], own["b"], own["peak_d"], own["peak_gold"]) == pytest.approx(
        (1.5, 1, math.exp(0.5), math.exp(0.5))
    )
    assert own["rmse"] == pytest.approx(0, abs=1e-9)
    assert own["extrapolated_seeds"] == 2
    assert own["extrapolation_rmse"] < 1e-9 < own["last_value_rmse"]
    assert found["rl", "helpful-1000", "best_of_n"]["rmse"] > 0.01
    assert (found["best of n", CONTROL, "best_of_n"]["a"], found["best of n", CONTROL, "best_of_n"]["b"]) == (
        pytest.approx((3, 1))
    )
    near = {name: rl_curve(1, 1, furthest=0.2) for name in AS_PUBLISHED}
    short = fits(runs(near, pool_curve(3.0, 1.0)))[0]
    assert (short["a"], short["extrapolation_rmse"], short["extrapolated_seeds"]) == ("", "", 0)


def test_peaks_have_a_row_for_every_curve() -> None:
    rows = peaks(runs(AS_PUBLISHED, pool_curve(3.0, 1.0)))
    assert len(rows) == 2 * 3 * 2
    best = next(row for row in rows if row["optimiser"] == "best of n")
    assert (best["heldout_accuracy"], best["nats_per_gold"]) == (0.9, pytest.approx(1.58**2 / (1.58 * 1.42)))
