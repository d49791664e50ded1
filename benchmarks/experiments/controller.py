"""PPO's KL coefficient in the laboratory: fixed, steered in the right unit, steered in a wrong one, and none at all.

    python -m benchmarks.experiments.controller [--slice]

    fixed-B                a coefficient of 0 (no control), 0.05, 0.1, 0.2 or 0.5
    adaptive-sequence      the controller at 6 nats per sequence, fed the KL per sequence
    adaptive-token         the same, fed the mean log-ratio per token
    adaptive-released      the same, fed what the released APA code computes

Production code refuses the last two by type; here a subclass feeds them. The learning rate is the one that experiment
`algorithms` chose for PPO. Writes curves below raw/, summary.csv, verdicts.json and controller.png.
"""

from collections.abc import Sequence

from benchmarks.experiments.laboratory import figures, report
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import ALGORITHMS, TARGET_NATS, Command, parse, tempered, tuned_rates
from benchmarks.experiments.laboratory.report import BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, Curve, falling, judge, last, turns
from configs.kl import KLControllerConfig

NAME = "controller"
BETAS = (0.0, 0.05, 0.1, 0.2, 0.5)
TOLERANCE = 0.2
"""Share of the target within which a run has to end."""
PROXY_DROP = 0.25
"""By how much the proxy must end below its peak to have dropped, in standard deviations of the supervised policy."""


def main() -> None:
    """Run all arms, and say what came out."""
    command = parse(__doc__)
    curves = report.run(arms(command, tuned_rates(command, ["ppo"])["ppo"]), command)
    directory = command.places.results / NAME
    report.publish(directory, curves, claims(curves))
    panels = [
        *(figures.against_steps(column) for column in ("gold", "proxy", "kl_exact_nats", "kl_beta")),
        figures.against_distance("gold"),
    ]
    figures.save(directory / f"{NAME}.png", report.whole_runs(curves), panels)


def arms(command: Command, learning_rate: float) -> list[Arm]:
    """List the arms of all seeds."""
    plan, adaptive = command.plan, ALGORITHMS["ppo"]
    found: list[Arm] = []
    for seed in plan.seeds:
        common = {"learning_rate": learning_rate, "seed": seed}
        for beta in BETAS:
            fixed = tempered(adaptive, kl_beta=beta, kl_controller=KLControllerConfig())
            found.append(plan.arm(NAME, f"fixed-{beta:g}", fixed, **common))
        found.append(plan.arm(NAME, "adaptive-sequence", adaptive, **common))
        found.append(plan.arm(NAME, "adaptive-token", adaptive, wrong_unit="k1_per_token", **common))
        found.append(plan.arm(NAME, "adaptive-released", adaptive, wrong_unit="released", **common))
    return found


def claims(curves: dict[str, BySeed]) -> list[Claim]:
    """Judge what a coefficient does, whether the controller arrives, and whether it is what lets the reward drop."""
    right, token, released = (curves[f"adaptive-{unit}"] for unit in ("sequence", "token", "released"))
    seeds = list(right)

    def ends(seed: int) -> list[float]:
        return [last(curves[f"fixed-{beta:g}"][seed], "kl_exact_nats") for beta in BETAS]

    def figures_of(by_seed: BySeed) -> str:
        kls = [last(curve, "kl_exact_nats") for curve in by_seed.values()]
        betas = [last(curve, "kl_beta") for curve in by_seed.values()]
        return f"KL {min(kls):.2f} to {max(kls):.2f}, coefficient {min(betas):.3f} to {max(betas):.3f}."

    return [
        judge(
            "E2",
            "the larger a fixed coefficient, the smaller the KL at the end",
            {seed: falling(ends(seed)) for seed in seeds},
        ),
        judge(
            "E3, right unit",
            f"the controller ends within {TOLERANCE:.0%} of {TARGET_NATS:g} nats",
            {seed: arrives(right[seed]) for seed in seeds},
            figures=figures_of(right),
        ),
        judge(
            "E3, per token",
            "fed the KL per token, the controller does not arrive",
            {seed: not arrives(token[seed]) for seed in seeds},
            figures=figures_of(token),
        ),
        judge(
            "E3, released",
            "fed what the released code computes, the controller does not arrive",
            {seed: not arrives(released[seed]) for seed in seeds},
            figures=figures_of(released),
        ),
        judge(
            "Figure 8, without control",
            "without control PPO ends with more KL and more proxy than with it",
            {
                seed: all(last(curves["fixed-0"][seed], c) > last(right[seed], c) for c in ("kl_exact_nats", "proxy"))
                for seed in seeds
            },
        ),
        judge(
            "Figure 8, with control",
            "with the controller the proxy drops in the middle of the run",
            {seed: turns(right[seed], drop=PROXY_DROP, column="proxy") for seed in seeds},
            in_released={seed: turns(released[seed], drop=PROXY_DROP, column="proxy") for seed in seeds},
        ),
        judge(
            "E7",
            "the proxy drops in some arm, and only where the controller has raised its coefficient",
            {seed: only_risen_drop([arm[seed] for arm in (right, token, released)]) for seed in seeds},
        ),
    ]


def arrives(curve: Curve) -> bool:
    """Say whether the exact KL ends near the target."""
    return abs(last(curve, "kl_exact_nats") / TARGET_NATS - 1) <= TOLERANCE


def only_risen_drop(arms: Sequence[Curve]) -> bool:
    """Say whether the proxy drops in some arm, and the coefficient was above its first value in each where it does."""
    dropped = [curve for curve in arms if turns(curve, drop=PROXY_DROP, column="proxy")]
    return bool(dropped) and all(curve["kl_beta"].max() > curve["kl_beta"][0] for curve in dropped)


if __name__ == "__main__":
    main()
