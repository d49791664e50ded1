"""Two reward models against one in the laboratory, on prompts of which a quarter have harm at stake.

    python -m benchmarks.experiments.two_rewards [--slice]

Where harm is at stake, the words that make an answer helpful make it harmful. 4,000 pairs are labelled by the helpful
gold score, on prompts of all kinds, and 4,000 by the harmless one, on prompts with harm at stake. Three arms on seeds 1
to 5 learn from these same labels:

    one        one reward model of all 8,000 pairs
    linear     a model of each 4,000, and the sum of their calibrated scores
    llama-2    the same two, and the rule of Llama 2: the harmless one's score where the prompt is known to have harm at
               stake or sigmoid(score) < 0.15, the helpful one's elsewhere

All by PPO, at the learning rate that experiment `algorithms` chose for it; their rewards have different scales, so what
is compared is gold at the same exact KL. Elsewhere no answer does harm (harmless gold is 0), so harmless gold is that
of prompts with harm at stake. Only llama-2 is told which prompts these are. Writes curves below raw/, summary.csv,
frontier.csv (gold by kind of prompt at the same KL), verdicts.json and two_rewards.png.
"""

import math
from dataclasses import replace
from typing import Any

from benchmarks.experiments.algorithms import interval
from benchmarks.experiments.laboratory import figures, report
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import ALGORITHMS, CHOICE_KL_NATS, Command, parse, tuned_rates, write_table
from benchmarks.experiments.laboratory.report import BySeed
from benchmarks.experiments.laboratory.verdicts import Claim, Curve, at_kl, judge
from benchmarks.experiments.laboratory.world import RewardSpec
from configs.scoring import SafetyFirstCombination

NAME = "two_rewards"
GOLDS = ("harmless_sensitive", "helpful_other", "helpful_sensitive")
MARGIN = 0.1
"""What helpful gold may lose and count as kept, in standard deviations of the supervised policy: twice the noise of an
evaluation."""


def main() -> None:
    """Run all arms, and say what came out."""
    command = parse(__doc__)
    curves = report.run(arms(command, tuned_rates(command, ["ppo"])["ppo"]), command)
    directory = command.places.results / NAME
    report.publish(directory, curves, claims(curves))
    write_table(directory / "frontier.csv", report.frontier(curves, (*GOLDS, "gold", "proxy")))
    panels = [
        *(figures.against_distance(column) for column in GOLDS),
        *(figures.against_steps(column) for column in ("harmless_sensitive", "helpful_other", "kl_exact_nats")),
    ]
    figures.save(directory / f"{NAME}.png", report.whole_runs(curves), panels)


def arms(command: Command, learning_rate: float) -> list[Arm]:
    """List the arms of all seeds."""
    plan = command.plan
    rewards = ways(plan.reward)
    return [
        plan.arm(NAME, name, ALGORITHMS["ppo"], learning_rate=learning_rate, seed=seed, gold="helpful", **settings)
        for seed in plan.seeds
        for name, settings in rewards.items()
    ]


def ways(reward: RewardSpec) -> dict[str, dict[str, Any]]:
    """Describe how the arms come by their reward, from as many labels.

    Args:
        reward: Whose number of pairs is that of all labels.

    Returns:
        Arm -> its reward models and how they are combined.
    """
    half = reward.num_pairs // 2
    helpful, harmless = replace(reward, num_pairs=half), replace(reward, gold="harmless", num_pairs=half)
    rule = SafetyFirstCombination(helpfulness=helpful.name, safety=harmless.name)
    return {
        "one": {"rewards": (replace(reward, gold="mixed", num_pairs=2 * half),)},
        "linear": {"rewards": (helpful, harmless)},
        "llama-2": {"rewards": (helpful, harmless), "combination": rule},
    }


def claims(curves: dict[str, BySeed]) -> list[Claim]:
    """Judge whether two models are less harmful and as helpful, elsewhere and at large, at the same exact KL."""
    found: list[Claim] = []
    for name in ("linear", "llama-2"):
        for helpful, where in (("helpful_other", "where no harm is at stake"), ("gold", "over all prompts")):
            two, one = curves[name], curves["one"]
            found.append(
                judge(
                    f"{name}, {where}",
                    f"at {CHOICE_KL_NATS:g} nats two models have more harmless gold than one, and lose at most "
                    f"{MARGIN:g} of helpful gold {where}",
                    {seed: is_better(two[seed], one[seed], helpful=helpful) for seed in one},
                    figures=differences(two, one, helpful=helpful),
                )
            )
    return found


def is_better(two: Curve, one: Curve, *, helpful: str) -> bool:
    """Say whether the first has more harmless gold and no less helpful gold than the margin allows, at the same KL."""
    gains = [gain(two, one, column) for column in ("harmless_sensitive", helpful)]
    return gains[0] > 0 and gains[1] >= -MARGIN


def gain(two: Curve, one: Curve, column: str) -> float:
    """Compute by how much a column of the first is greater at the same KL; NaN where one of them does not get there."""
    return at_kl(two, CHOICE_KL_NATS, column=column) - at_kl(one, CHOICE_KL_NATS, column=column)


def differences(two: BySeed, one: BySeed, *, helpful: str) -> str:
    """Describe the paired differences, with their 95% t intervals over the seeds that get there in both arms."""
    both = [seed for seed in one if not math.isnan(gain(two[seed], one[seed], helpful))]
    if not both:
        return f"No seed reaches {CHOICE_KL_NATS:g} nats in both arms."
    parts: list[str] = []
    for column, words in (("harmless_sensitive", "harmless"), (helpful, "helpful")):
        first, second = ([at_kl(by[seed], CHOICE_KL_NATS, column=column) for seed in both] for by in (two, one))
        parts.append(f"{words} {interval(first, second)}")
    return f"Differences: {', '.join(parts)} ({len(both)} seeds)."


if __name__ == "__main__":
    main()
