"""Over-optimisation in the laboratory: a proxy goes on rising while gold falls, by RL and by best of n.

    python -m benchmarks.experiments.overoptimization [--slice]

    helpful-N    PPO without KL control on a proxy of N in {250, 1000, 2000, 8000} pairs; each N begins the next
    control-N    the same for 8,000 pairs of the control gold, which is linear in counts and has no reason to turn

Best of n up to 1,024 uses the same proxies, on one pool of 16 x 1,024 samples of the supervised policy a seed. The
learning rate is the one that experiment `algorithms` chose for PPO. Distances are d = sqrt(KL), exact for RL and
analytic for best of n. Both of Gao et al.'s forms are fitted to both optimisers' gold beyond d = 0.3, all seeds
together with a bootstrap over seeds; for each seed the fit to the nearer half of d predicts the rest.

The penalty for a missing end counts in what is optimised, and the proxy is reported without it. Writes curves below
raw/ and best_of_n/, summary.csv, peaks.csv, fits.csv, verdicts.json and overoptimization.png.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments import overoptimization_forms as forms
from benchmarks.experiments.laboratory import figures, pool, report
from benchmarks.experiments.laboratory.arm_queue import Task, run_tasks
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import ALGORITHMS, Command, Plan, parse, tempered, tuned_rates, write_table
from benchmarks.experiments.laboratory.report import BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, Curve, falling, judge, read_curve, turns
from benchmarks.experiments.laboratory.world import RewardSpec
from configs.algorithm import AlgorithmConfig
from configs.kl import KLControllerConfig

NAME = "overoptimization"
FRACTIONS = (32, 8, 4, 1)
"""The proxies' shares of the plan's pairs."""
RESAMPLES, CONFIDENCE = 1000, 0.95
Optimisers = dict[str, dict[str, BySeed]]
"""Optimiser -> proxy -> seed -> curve."""
FORMS: dict[str, forms.Form] = {"rl": "rl", "best of n": "best_of_n"}
"""Which form Gao et al. have for which optimiser."""


def main() -> None:
    """Run all arms, read best of n off the pools, and say what came out."""
    command = parse(__doc__)
    rate = tuned_rates(command, ["ppo"])["ppo"]
    rl = report.run(arms(command, rate), command)
    runs: Optimisers = {"rl": rl, "best of n": best_of_n(command)}
    directory = command.places.results / NAME
    names = list(specs(command.plan))
    write_table(directory / "peaks.csv", peaks(runs))
    write_table(directory / "fits.csv", fits(runs))
    report.publish(directory, rl, claims(runs, counts=names[:-1], control=names[-1]))
    of_rl = {name: list(by_seed.values()) for name, by_seed in rl.items()}
    panels = [*(beside(name, runs) for name in names), figures.against_distance("gold")]
    figures.save(directory / f"{NAME}.png", of_rl, panels)


def specs(plan: Plan) -> dict[str, RewardSpec]:
    """Name the proxies: by rising number of pairs, and the control last."""
    found = [replace(plan.reward, num_pairs=plan.reward.num_pairs // fraction) for fraction in FRACTIONS]
    found.append(replace(plan.reward, gold="control"))
    return {f"{spec.gold}-{spec.num_pairs}": spec for spec in found}


def without_control() -> AlgorithmConfig:
    """Configure PPO with nothing that holds it to the reference."""
    return tempered(ALGORITHMS["ppo"], kl_beta=0.0, kl_controller=KLControllerConfig())


def arms(command: Command, learning_rate: float) -> list[Arm]:
    """List the arms of all seeds."""
    free = without_control()
    return [
        command.plan.arm(NAME, name, free, learning_rate=learning_rate, seed=seed, rewards=(spec,), gold=spec.gold)
        for seed in command.plan.seeds
        for name, spec in specs(command.plan).items()
    ]


def best_of_n(command: Command) -> dict[str, BySeed]:
    """Read the curves of best of n, after writing those that are not there."""
    plan, directory = command.plan, command.places.results / NAME / "best_of_n"
    wanted, num = specs(plan), plan.size.anchors // 2

    def path(spec: RewardSpec, seed: int) -> Path:
        return directory / pool.file_of(spec, seed=seed, size=plan.size, num=num)

    tasks = [
        Task(
            what=f"best of n, seed {seed}",
            do=pool.evaluate,
            arguments=(command.places.worlds, directory, seed, plan.size, list(wanted.values()), num),
        )
        for seed in plan.seeds
        if not all(path(spec, seed).exists() for spec in wanted.values())
    ]
    run_tasks(tasks, processes=command.processes)
    return {name: {seed: read_curve(path(spec, seed)) for seed in plan.seeds} for name, spec in wanted.items()}


def peak(curve: Curve) -> dict[str, float]:
    """Find where gold is highest.

    Args:
        curve: An arm's, of which three evaluations are averaged against the noise; or a pool's, as it is.

    Returns:
        The exact KL there, and what gold and proxy have gained over the supervised policy.
    """
    width = 1 if "n" in curve else 3
    smooth = {
        c: np.convolve(curve[c], np.full(width, 1 / width), mode="valid") for c in ("kl_exact_nats", "gold", "proxy")
    }
    place = int(np.argmax(smooth["gold"]))
    gains = {f"{c}_gain": float(smooth[c][place] - curve[c][0]) for c in ("gold", "proxy")}
    return {"kl_exact_nats": float(smooth["kl_exact_nats"][place])} | gains


def price(curve: Curve) -> float:
    """Compute the KL that a unit of gold has cost at the peak; infinite where nothing was gained."""
    found = peak(curve)
    return found["kl_exact_nats"] / found["gold_gain"] if found["gold_gain"] > 0 else float("inf")


def peaks(runs: Optimisers) -> list[dict[str, Any]]:
    """Describe the peak of every curve, and how good its proxy is on held-out pairs."""
    return [
        {"optimiser": optimiser, "proxy_of": name, "seed": seed}
        | {"heldout_accuracy": float(runs["best of n"][name][seed]["heldout_accuracy"][0])}
        | {f"peak_{column}": value for column, value in peak(curve).items()}
        | {"nats_per_gold": price(curve), "end_gold_gain": float(curve["gold"][-1] - curve["gold"][0])}
        for optimiser, by_name in runs.items()
        for name, by_seed in by_name.items()
        for seed, curve in by_seed.items()
    ]


def gained(curve: Curve) -> tuple[forms.Floats, forms.Floats]:
    """Give distances and gold less that of the supervised policy."""
    return np.sqrt(np.maximum(curve["kl_exact_nats"], 0)), curve["gold"] - curve["gold"][0]


def fits(runs: Optimisers) -> list[dict[str, Any]]:
    """Fit both forms to the gold of every proxy and optimiser; blank cells where too few distances are far enough."""
    return [
        {"optimiser": optimiser, "proxy_of": name, "form": form} | fitted([gained(c) for c in by_seed.values()], form)
        for optimiser, by_name in runs.items()
        for name, by_seed in by_name.items()
        for form in FORMS.values()
    ]


def fitted(curves: list[tuple[forms.Floats, forms.Floats]], form: forms.Form) -> dict[str, Any]:
    """Fit a form to all seeds together, with intervals and the errors of extrapolation."""
    row: dict[str, Any] = dict.fromkeys(
        ("a", "a_low", "a_high", "b", "b_low", "b_high", "rmse", "peak_d", "peak_gold"), ""
    )
    if all(enough(d, float(d.max())) for d, _ in curves):
        d, gold = (np.concatenate(part) for part in zip(*curves, strict=True))
        curve = forms.fit(d, gold, form=form)
        a, b = forms.bootstrap(curves, form=form, resamples=RESAMPLES, confidence=CONFIDENCE, seed=0)
        row |= {"a": curve.a, "a_low": a[0], "a_high": a[1], "b": curve.b, "b_low": b[0], "b_high": b[1]}
        far = d > forms.LEAST_D
        row["rmse"] = float(np.sqrt(np.mean((gold[far] - curve.at(d[far])) ** 2)))
        if curve.peak is not None:
            row["peak_d"], row["peak_gold"] = curve.peak
    found = [e for e in (extrapolated(d, gold, form) for d, gold in curves) if e is not None]
    row |= {
        "extrapolated_seeds": len(found),
        "extrapolation_rmse": float(np.mean([e.rmse for e in found])) if found else "",
        "last_value_rmse": float(np.mean([e.rmse_of_last_value for e in found])) if found else "",
    }
    return row


def enough(d: forms.Floats, bound: float) -> bool:
    """Say whether two coefficients can be fitted to the distances up to a bound."""
    return len(np.unique(d[(d > forms.LEAST_D) & (d <= bound)])) >= 2


def extrapolated(d: forms.Floats, gold: forms.Floats, form: forms.Form) -> forms.Extrapolation | None:
    """Predict the further half of a curve from the nearer; None where the nearer half has too few distances."""
    return forms.extrapolate(d, gold, form=form) if enough(d, float(d.max()) / 2) else None


def claims(runs: Optimisers, *, counts: list[str], control: str) -> list[Claim]:
    """Judge turnover (E4), what labels buy (E5), what best of n costs (E6), and whether the forms predict.

    Args:
        runs: All curves.
        counts: The proxies of the nonlinear gold by rising number of pairs.
        control: The control's proxy.
    """
    rl, chosen = runs["rl"], runs["best of n"]
    seeds, most = list(rl[counts[0]]), counts[-1]

    def rises(column: str) -> dict[int, bool]:
        return {seed: falling([-peak(rl[name][seed])[column] for name in counts]) for seed in seeds}

    def gains(seed: int) -> bool:
        first, final = peak(rl[counts[0]][seed]), peak(rl[most][seed])
        return all(final[column] > first[column] for column in ("gold_gain", "kl_exact_nats"))

    turned = {name: {seed: turns(rl[name][seed]) for seed in seeds} for name in [*counts, control]}
    return [
        judge(
            "E4",
            "gold ends at least half a standard deviation below its peak with the nonlinear gold, and not the control",
            {seed: turned[most][seed] and not turned[control][seed] for seed in seeds},
            figures="Seeds that turn: " + ", ".join(f"{n} {sum(t.values())}" for n, t in turned.items()) + ".",
        ),
        judge(
            "E5, height",
            "each step of labels has a higher peak of gold",
            rises("gold_gain"),
            figures=means(rl, counts, "gold_gain"),
        ),
        judge(
            "E5, distance",
            "each step of labels has its peak of gold at a larger KL",
            rises("kl_exact_nats"),
            figures=means(rl, counts, "kl_exact_nats"),
        ),
        judge(
            "E5, first and last",
            "the most labels have a higher peak of gold at a larger KL than the fewest",
            {seed: gains(seed) for seed in seeds},
        ),
        judge(
            "E6",
            f"best of n pays less KL for a unit of gold at its peak than RL does at its own, {most}",
            {seed: price(chosen[most][seed]) < price(rl[most][seed]) for seed in seeds},
            figures=prices(runs, [*counts, control]),
        ),
        *(
            judge(
                f"Forms, {optimiser}",
                f"fitted to the nearer half of d, the form predicts gold in the rest better than no change, {most}",
                {seed: predicts(curve, FORMS[optimiser]) for seed, curve in runs[optimiser][most].items()},
            )
            for optimiser in FORMS
        ),
    ]


def predicts(curve: Curve, form: forms.Form) -> bool:
    """Say whether extrapolation beats a guess of no change; what has no fit predicts nothing."""
    found = extrapolated(*gained(curve), form)
    return found is not None and found.rmse < found.rmse_of_last_value


def means(runs: Mapping[str, BySeed], names: list[str], column: str) -> str:
    """Write the means over seeds of something at the peak."""
    values = {name: np.mean([peak(curve)[column] for curve in runs[name].values()]) for name in names}
    return "Means: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()) + "."


def prices(runs: Optimisers, names: list[str]) -> str:
    """Write the mean prices of both optimisers."""
    parts = [
        f"{name} {np.mean([price(c) for c in runs['best of n'][name].values()]):.2f} against "
        f"{np.mean([price(c) for c in runs['rl'][name].values()]):.2f}"
        for name in names
    ]
    return "Nats a unit, best of n against RL: " + ", ".join(parts) + "."


def beside(name: str, runs: Optimisers) -> figures.Draw:
    """Draw proxy and gold of one reward model over d, RL beside best of n, one line a seed."""

    def draw(axis: Any, curves: object, colors: object) -> None:
        for optimiser, style in (("rl", "-"), ("best of n", ":")):
            for column, color in (("proxy", "tab:gray"), ("gold", "tab:orange")):
                for number, curve in enumerate(runs[optimiser][name].values()):
                    root = np.sqrt(np.maximum(curve["kl_exact_nats"], 0))
                    label = f"{column}, {optimiser}" if number == 0 else None
                    axis.plot(root, curve[column], style, color=color, alpha=0.7, linewidth=1, label=label)
        axis.set(xlabel="square root of the KL (nats)", ylabel="std of the supervised policy", title=name)

    return draw


if __name__ == "__main__":
    main()
