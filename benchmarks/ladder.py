"""How often the ladder's 95% intervals hold the truth, over simulated tournaments whose truth is known.

    python -m benchmarks.ladder

Each vote comes from latent qualities of its prompt's responses, so that votes on one prompt depend on each other, as
real ones do, while over all prompts P(first wins) + P(tie) / 2 = sigma(theta_first - theta_second) holds exactly.
Writes docs/results/ladder_coverage.json and exits with 1 unless, in the realistic tournaments, the bootstrap and the
sandwich intervals cover between 93% and 97%.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from reward_service.bradley_terry import ELO_PER_LOGIT
from reward_service.ladder import Comparison, Ladder, fit_ladder

LOWEST, HIGHEST = 0.93, 0.97
OUTPUT = Path("docs/results/ladder_coverage.json")
INTERVALS = ("bootstrap", "sandwich", "wider_of_both", "independent_comparisons", "win_rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A kind of tournament.

    Args:
        elo: The true ratings; the first is the anchor. The last two are equal, so that every promotion of the last over
            the one before is a false one.
        prompts: Prompts.
        pairs_per_prompt: Pairs of versions that are compared on each prompt, drawn anew.
        labelers: Votes on each of those pairs.
        tie_share: Ties are this share of 2 p (1 - p): 0.4 makes a fifth of the votes between equals ties.
        correlation: Of the latent difference, between votes on the same pair of responses.
    """

    name: str
    elo: tuple[float, ...] = (0.0, 60.0, 120.0, 120.0)
    prompts: int = 200
    pairs_per_prompt: int = 3
    labelers: int = 2
    tie_share: float = 0.4
    correlation: float = 0.5


REALISTIC = Scenario(name="realistic")
SCENARIOS = (
    REALISTIC,
    Scenario(name="one vote a prompt", pairs_per_prompt=1, labelers=1),
    Scenario(name="30 prompts", prompts=30),
)


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tournaments", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    results = [study(s, tournaments=options.tournaments, resamples=options.resamples) for s in SCENARIOS]
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("scenario", *INTERVALS, "false promotions", "s a tournament")
    for result in results:
        shares = [f"{result['coverage'][name]:.3f}" for name in INTERVALS]
        table.add_row(
            result["scenario"]["name"],
            *shares,
            f"{result['false_promotions']:.3f}",
            f"{result['seconds_per_tournament']:.3f}",
        )
    Console(width=140).print(table)
    raise SystemExit(0 if holds(results[0]) else 1)


def holds(result: dict[str, Any]) -> bool:
    """Tell whether both kinds of interval keep their promise."""
    return all(LOWEST <= result["coverage"][name] <= HIGHEST for name in ("bootstrap", "sandwich"))


def study(scenario: Scenario, *, tournaments: int, resamples: int) -> dict[str, Any]:
    """Count how often each interval of each lead holds the true lead.

    Returns:
        `coverage` by interval over all leads, `coverage_by_lead`, `false_promotions` (share of tournaments in which the
        last version would have replaced its equal), `seconds_per_tournament` and the scenario.
    """
    held: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in INTERVALS}
    promoted = 0
    truth = {f"v{place}": elo for place, elo in enumerate(scenario.elo)}
    incumbent, newest = list(truth)[-2:]
    start = perf_counter()
    for seed in range(tournaments):
        comparisons = simulate(scenario, np.random.default_rng([seed, 1]))
        ladder = fit_ladder(comparisons, anchor="v0", bootstrap_resamples=resamples, seed=seed)
        promoted += _note(ladder, truth, held, newest=newest, incumbent=incumbent)
    seconds = perf_counter() - start
    by_lead = {name: {lead: float(np.mean(hits)) for lead, hits in leads.items()} for name, leads in held.items()}
    return {
        "scenario": asdict(scenario),
        "tournaments": tournaments,
        "bootstrap_resamples": resamples,
        "coverage": {name: float(np.mean([*leads.values()])) for name, leads in by_lead.items()},
        "coverage_by_lead": by_lead,
        "false_promotions": promoted / tournaments,
        "seconds_per_tournament": seconds / tournaments,
    }


def simulate(scenario: Scenario, rng: np.random.Generator) -> list[Comparison]:
    """Play one tournament."""
    pairs = list(combinations(range(len(scenario.elo)), 2))
    comparisons = []
    for prompt in range(scenario.prompts):
        quality = rng.standard_normal(len(scenario.elo))
        for chosen in rng.choice(len(pairs), scenario.pairs_per_prompt, replace=False):
            first, second = pairs[chosen]
            shared = sqrt(scenario.correlation / 2) * (quality[first] - quality[second])
            p = 1 / (1 + np.exp((scenario.elo[second] - scenario.elo[first]) / ELO_PER_LOGIT))
            for labeler in range(scenario.labelers):
                latent = shared + sqrt(1 - scenario.correlation) * rng.standard_normal()
                comparisons.append(
                    Comparison(
                        first=f"v{first}",
                        second=f"v{second}",
                        prompt_id=f"p{prompt}",
                        outcome=_outcome(p, NormalDist().cdf(float(latent)), scenario.tie_share),
                        labeler=f"labeler {labeler}",
                    )
                )
    return comparisons


def _outcome(p: float, uniform: float, tie_share: float) -> float:
    ties = tie_share * 2 * p * (1 - p)
    if uniform > 1 - p + ties / 2:
        return 1.0
    return 0.5 if uniform > 1 - p - ties / 2 else 0.0


def _note(
    ladder: Ladder, truth: dict[str, float], held: dict[str, dict[str, list[bool]]], *, newest: str, incumbent: str
) -> bool:
    """Note which intervals hold the truth; tell whether the newest version would have been promoted."""
    promoted = False
    for pair in ladder.pairs:
        # One direction for each lead, whichever version came out higher.
        turned = pair.version < pair.over
        lead = pair.lead.turned() if turned else pair.lead
        name = f"{lead.version} over {lead.over}"
        true = truth[lead.version] - truth[lead.over]
        independent = NormalDist().inv_cdf(0.975) * lead.se_elo
        intervals = {
            "bootstrap": lead.ci,
            "sandwich": lead.ci_sandwich,
            "wider_of_both": (lead.ci_low, lead.ci_high),
            "independent_comparisons": (lead.elo - independent, lead.elo + independent),
        }
        for kind, (low, high) in intervals.items():
            held[kind][name].append(low <= true <= high)
        if pair.win_rate_ci is not None:
            rate = 1 / (1 + np.exp((-1 if turned else 1) * -true / ELO_PER_LOGIT))
            held["win_rate"][name].append(bool(pair.win_rate_ci[0] <= rate <= pair.win_rate_ci[1]))
        if (lead.version, lead.over) == (newest, incumbent):
            promoted = lead.ci_low > 0
    return promoted


if __name__ == "__main__":
    main()
