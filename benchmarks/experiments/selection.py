"""DPO and rejection-sampling fine-tuning in the laboratory, on the frontier of PPO and APA.

    python -m benchmarks.experiments.selection [--slice]

The grid of learning rates on seed 0 (selection/learning_rates.csv), then six arms on seeds 1 to 5:

    apa, ppo          as experiment `algorithms` runs them, and shared with it, like the first 40 iterations of both,
                      evaluated after each (apa-early, ppo-early): the yardsticks at the same exact KL
    dpo-0.1           the best of four responses against the worst, anew in every iteration, dpo_beta 0.1
    dpo-0.5           the same with dpo_beta 0.5
    rft               the best of four responses, and as many that were the best of an earlier prompt
    rft-forgetful     the newest best responses alone

Every iteration of every arm samples 128 responses and makes four steps: the arms of this experiment ask 32 prompts four
times where the others ask 128 once. The rates of dpo-0.5 and rft-forgetful are those of dpo-0.1 and rft. Writes curves
below raw/, learning_rates.csv, summary.csv, frontier.csv (gold and proxy at the same exact KL), verdicts.json and
selection.png.
"""

from benchmarks.experiments.algorithms import difference, matched
from benchmarks.experiments.laboratory import figures, report
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import (
    ALGORITHMS,
    EARLY,
    SELECTION,
    Command,
    parse,
    tempered,
    tuned_rates,
    write_table,
)
from benchmarks.experiments.laboratory.report import BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, at_kl, judge, last, turns

NAME = "selection"
YARDSTICKS = ("apa", "ppo")
BETAS = (0.1, 0.5)
COMMON_NATS = 2.0
"""Where DPO is compared; APA hardly goes beyond three."""
SHORT_NATS = 1.0
"""Where rejection sampling is compared: the best of four is at most 0.64 nats away from what it chooses from."""


def main() -> None:
    """Choose learning rates, run all arms, and say what came out."""
    command = parse(__doc__)
    rates = tuned_rates(command, YARDSTICKS)
    rates |= tuned_rates(command, tuple(SELECTION), algorithms=SELECTION, experiment=NAME)
    curves = report.run(arms(command, rates), command)
    directory = command.places.results / NAME
    report.publish(directory, curves, claims(curves))
    write_table(directory / "frontier.csv", report.frontier(curves, ("gold", "proxy")))
    panels = [
        *(figures.against_distance(column) for column in ("gold", "proxy")),
        *(figures.against_steps(column) for column in ("kl_exact_nats", "gold", "proxy")),
        figures.against_steps("entropy_nats_per_token"),
    ]
    figures.save(directory / f"{NAME}.png", report.whole_runs(curves), panels)


def arms(command: Command, rates: dict[str, float]) -> list[Arm]:
    """List the arms of all seeds."""
    plan = command.plan
    methods = {name: (ALGORITHMS[name], rates[name]) for name in YARDSTICKS}
    methods |= {f"dpo-{beta:g}": (tempered(SELECTION["dpo"], dpo_beta=beta), rates["dpo"]) for beta in BETAS}
    # Half as many are learned, so that as many steps are made.
    forgetful = tempered(SELECTION["rft"], memory_responses=0, minibatch_responses=16)
    methods |= {"rft": (SELECTION["rft"], rates["rft"]), "rft-forgetful": (forgetful, rates["rft"])}
    found: list[Arm] = []
    for seed in plan.seeds:
        for name, (algorithm, rate) in methods.items():
            found.append(plan.arm(NAME, name, algorithm, learning_rate=rate, seed=seed))
        for name in YARDSTICKS:
            found.append(plan.early(NAME, name, ALGORITHMS[name], learning_rate=rates[name], seed=seed))
    return found


def claims(curves: dict[str, BySeed]) -> list[Claim]:
    """Judge each method against PPO and APA at the same distance, what dpo_beta holds, and what memory is good for."""
    found = [
        beats(curves, name, yardstick, nats=nats)
        for name, nats in (("dpo-0.1", COMMON_NATS), ("dpo-0.5", COMMON_NATS), ("rft", SHORT_NATS))
        for yardstick in YARDSTICKS
    ]
    weak, strong = (curves[f"dpo-{beta:g}"] for beta in BETAS)
    rft, forgetful = curves["rft"], curves["rft-forgetful"]
    return [
        *found,
        judge(
            "dpo_beta",
            "DPO ends with less KL with dpo_beta 0.5 than with 0.1",
            {seed: last(strong[seed], "kl_exact_nats") < last(weak[seed], "kl_exact_nats") for seed in weak},
        ),
        judge(
            "DPO deteriorates",
            "gold of DPO with dpo_beta 0.1 ends at least half a standard deviation below its peak",
            {seed: turns(weak[seed]) for seed in weak},
        ),
        judge(
            "memory",
            "rejection sampling ends with more gold when it learns earlier choices once more",
            {seed: last(rft[seed], "gold") > last(forgetful[seed], "gold") for seed in rft},
            figures=difference(rft, forgetful),
        ),
    ]


def beats(curves: dict[str, BySeed], name: str, yardstick: str, *, nats: float) -> Claim:
    """Judge whether a method has more gold than another at the same exact KL; no seed that falls short counts."""
    method, other = curves[name], curves[f"{yardstick}{EARLY}"]
    return judge(
        f"{name} over {yardstick}",
        f"{name} has more gold than {yardstick} at the same exact KL of {nats:g} nats",
        {seed: at_kl(method[seed], nats, column="gold") > at_kl(other[seed], nats, column="gold") for seed in method},
        figures=matched(method, other),
    )


if __name__ == "__main__":
    main()
