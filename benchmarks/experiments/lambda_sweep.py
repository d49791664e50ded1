"""APA's lambda in the laboratory: what it holds the policy to, with raw and with whitened advantages.

    python -m benchmarks.experiments.lambda_sweep [--slice]

Lambda in {0.1, 0.5, 1, 2} times raw advantages (lambda is in units of the score) and whitened ones (as in the released
code, where the effective KL coefficient is lambda times the standard deviation of the advantages, beta_eff). The
learning rate is the one that experiment `algorithms` chose for APA. Writes curves below raw/, summary.csv,
verdicts.json and lambda_sweep.png.
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments.laboratory import figures, report
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import ALGORITHMS, Command, parse, tempered, tuned_rates
from benchmarks.experiments.laboratory.report import BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, falling, judge, last

NAME = "lambda_sweep"
LAMBDAS = (0.1, 0.5, 1.0, 2.0)
NORMS = {"raw": "none", "whitened": "whiten"}


def main() -> None:
    """Run all arms, and say what came out."""
    command = parse(__doc__)
    curves = report.run(arms(command, tuned_rates(command, ["apa"])["apa"]), command)
    directory = command.places.results / NAME
    report.publish(directory, curves, claims(curves))
    panels = [
        *(figures.against_steps(column) for column in ("gold", "proxy", "kl_exact_nats", "beta_eff")),
        *(figures.against_distance(column) for column in ("gold", "proxy")),
    ]
    figures.save(directory / f"{NAME}.png", report.whole_runs(curves), panels)


def arms(command: Command, learning_rate: float) -> list[Arm]:
    """List the arms of all seeds."""
    plan = command.plan
    return [
        plan.arm(
            NAME,
            f"{norm}-{apa_lambda:g}",
            tempered(ALGORITHMS["apa"], apa_lambda=apa_lambda, adv_norm=adv_norm),
            learning_rate=learning_rate,
            seed=seed,
        )
        for seed in plan.seeds
        for norm, adv_norm in NORMS.items()
        for apa_lambda in LAMBDAS
    ]


def claims(curves: dict[str, BySeed]) -> list[Claim]:
    """Judge whether more lambda is less KL and less proxy, and whether whitening takes lambda's units away."""
    seeds = list(curves[f"raw-{LAMBDAS[0]:g}"])

    def ends(norm: str, column: str, seed: int) -> list[float]:
        return [last(curves[f"{norm}-{apa_lambda:g}"][seed], column) for apa_lambda in LAMBDAS]

    found: list[Claim] = []
    for column, words in (("kl_exact_nats", "KL"), ("proxy", "proxy")):
        falls = {norm: {seed: falling(ends(norm, column, seed)) for seed in seeds} for norm in NORMS}
        for norm in NORMS:
            means = [sum(ends(norm, column, seed)[i] for seed in seeds) / len(seeds) for i in range(len(LAMBDAS))]
            found.append(
                judge(
                    "E1",
                    f"the larger lambda, the smaller the {words} at the end, {norm} advantages",
                    falls[norm],
                    figures="Means: " + ", ".join(f"{m:.2f}" for m in means) + ".",
                )
            )
    found.append(
        judge(
            "beta_eff",
            "with whitened advantages and lambda 0.1 the effective coefficient falls while the policy improves",
            {seed: falls_over_time(curves["whitened-0.1"][seed]["beta_eff"]) for seed in seeds},
        )
    )
    return found


def falls_over_time(values: NDArray[np.float64]) -> bool:
    """Say whether the last three evaluations are on average below the first three that have a value."""
    known = values[~np.isnan(values)]
    return bool(known[-3:].mean() < known[:3].mean())


if __name__ == "__main__":
    main()
