"""APA, PPO and AWR in the laboratory: gold and proxy against steps, and gold against the distance that it cost.

    python -m benchmarks.experiments.algorithms [--slice]

First the grid of learning rates on seed 0 (algorithms/learning_rates.csv), then five arms on seeds 1 to 5:

    apa             lambda 0.1, raw advantages, as the paper has it
    ppo             the adaptive controller at 6 nats per sequence
    awr             lambda 1, weights up to 20
    apa, released   as the released code does it: see below
    ppo, released   the same, and the controller is fed what the released code computes, with its horizon of 10,000

and the first 40 iterations of apa and ppo once more (apa-early, ppo-early), evaluated after each: gold at the same KL
is read from these, since APA is past 2 nats at the other arms' first evaluation.

Both released arms whiten each minibatch's advantages by its own moments and step each minibatch twice in a row, as the
released code does; the other arms make two shuffled passes, APA with raw advantages and the others whitened over the
batch. As released, APA has no KL in the reward and PPO one that is steered; both are so in the arms of the papers too.

The released code differs in more, which no setting of the learner expresses or all arms share, so that a difference
is one of the algorithms: it counts padding in the moments of a minibatch and divides scores by their running deviation;
PPO has another learning rate at some sizes and a critic on the policy's trunk, APA other sampling. "The arm that copies
the released code" is to be read so.
Writes curves below raw/, learning_rates.csv, summary.csv, verdicts.json and algorithms.png.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.laboratory import figures, report
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import (
    ADAPTIVE,
    ALGORITHMS,
    EARLY,
    PUBLISHED_HORIZON,
    Command,
    parse,
    tempered,
    tuned_rates,
)
from benchmarks.experiments.laboratory.report import MATCHED_NATS, BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, at_kl, judge, last, paired, turns

NAME = "algorithms"
RELEASED: dict[str, Any] = {"adv_norm": "whiten", "adv_norm_over": "minibatch", "repeat_minibatch": True}
"""What the released code does in both algorithms."""
WATCHED = ("apa", "ppo")
"""Whose way out is evaluated after every iteration."""
ENTROPY_LEFT = 0.1
"""AWR's entropy has collapsed where less than this share of the supervised policy's is left."""


def main() -> None:
    """Choose learning rates, run all arms, and say what came out."""
    command = parse(__doc__)
    rates = tuned_rates(command, tuple(ALGORITHMS))
    curves = report.run(arms(command, rates), command)
    directory = command.places.results / NAME
    report.publish(directory, curves, claims(curves))
    panels = [
        *(figures.against_steps(column) for column in ("gold", "proxy", "kl_exact_nats")),
        *(figures.against_distance(column) for column in ("gold", "proxy")),
        figures.against_steps("entropy_nats_per_token"),
        figures.against_steps("response_tokens"),
    ]
    figures.save(directory / f"{NAME}.png", report.whole_runs(curves), panels)


def arms(command: Command, rates: dict[str, float]) -> list[Arm]:
    """List the arms of all seeds."""
    plan = command.plan
    found: list[Arm] = []
    for seed in plan.seeds:
        for name, algorithm in ALGORITHMS.items():
            found.append(plan.arm(NAME, name, algorithm, learning_rate=rates[name], seed=seed))
        for name in WATCHED:
            found.append(plan.early(NAME, name, ALGORITHMS[name], learning_rate=rates[name], seed=seed))
        apa, ppo = (tempered(ALGORITHMS[name], **RELEASED) for name in ("apa", "ppo"))
        found.append(plan.arm(NAME, "apa-released", apa, learning_rate=rates["apa"], seed=seed))
        slow = ADAPTIVE.model_copy(update={"horizon_episodes": PUBLISHED_HORIZON})
        wrong = {"wrong_unit": "released", "learning_rate": rates["ppo"], "seed": seed}
        found.append(plan.arm(NAME, "ppo-released", tempered(ppo, kl_controller=slow), **wrong))
    return found


def claims(curves: dict[str, BySeed]) -> list[Claim]:
    """Judge what the APA paper says, and what is expected of AWR."""
    apa, ppo, awr = curves["apa"], curves["ppo"], curves["awr"]
    released = curves["apa-released"], curves["ppo-released"]
    early = curves[f"apa{EARLY}"], curves[f"ppo{EARLY}"]

    def above(first: BySeed, second: BySeed) -> dict[int, bool]:
        return {seed: last(first[seed], "gold") > last(second[seed], "gold") for seed in first}

    def entropy_left(seed: int) -> float:
        entropy = awr[seed]["entropy_nats_per_token"]
        return float(entropy[-1] / entropy[0])

    left = [entropy_left(seed) for seed in awr]
    return [
        judge(
            "APA over PPO",
            "APA ends with more gold than PPO",
            above(apa, ppo),
            in_released=above(*released),
            figures=difference(apa, ppo),
        ),
        judge(
            "APA over AWR",
            "APA ends with more gold than AWR",
            above(apa, awr),
            in_released=above(released[0], awr),
            figures=difference(apa, awr),
        ),
        judge(
            "PPO deteriorates",
            "PPO's gold ends at least half a standard deviation below its peak, and APA's does not",
            {seed: turns(ppo[seed]) and not turns(apa[seed]) for seed in ppo},
            in_released={seed: turns(released[1][seed]) and not turns(released[0][seed]) for seed in ppo},
        ),
        judge(
            "E8",
            "APA has more gold than PPO at the same exact KL of 2 nats",
            {seed: at_kl(early[0][seed], 2, column="gold") > at_kl(early[1][seed], 2, column="gold") for seed in apa},
            figures=matched(*early),
        ),
        judge(
            "E9",
            f"AWR without an anchor keeps less than {ENTROPY_LEFT:.0%} of its entropy",
            {seed: entropy_left(seed) < ENTROPY_LEFT for seed in awr},
            figures=f"Share left: {min(left):.1%} to {max(left):.1%}.",
        ),
    ]


def difference(first: BySeed, second: BySeed) -> str:
    """Describe the paired difference of gold at the end."""
    ends = [[last(curve, "gold") for curve in by_seed.values()] for by_seed in (first, second)]
    return f"Difference of gold at the end: {interval(*ends)}."


def matched(first: BySeed, second: BySeed) -> str:
    """Describe the paired differences of gold at the same exact KL, over the seeds where both are seen there."""
    parts: list[str] = []
    for nats in MATCHED_NATS:
        both = np.array([[at_kl(by_seed[seed], nats, column="gold") for by_seed in (first, second)] for seed in first])
        both = both[~np.isnan(both).any(1)]
        if len(both):
            parts.append(f"{nats:g} nats {interval(both[:, 0].tolist(), both[:, 1].tolist())} (seeds: {len(both)})")
    return "Difference of gold at " + "; ".join(parts) + "." if parts else "No distance at which both are seen."


def interval(first: Sequence[float], second: Sequence[float]) -> str:
    """Write a paired difference with its 95% t interval, which takes two seeds."""
    if len(first) == 1:
        return f"{first[0] - second[0]:+.2f}"
    mean, low, high = paired(first, second)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
