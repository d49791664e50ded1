"""The evaluation before and after: held-out prompts, gold scores where there are any, and a win rate with interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster import schedule
from cluster.schedule import EVALUATION
from configs.run import RunConfig
from protocol.messages import Prompt, RolloutKey
from protocol.roles import Finished, RolloutPool, ScoredReferences, ScoringPool

GOLD = "gold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One policy version on the held-out prompts."""

    policy_version: int
    summary: dict[str, float]
    judged: dict[str, float]
    """Prompt id -> the score by which versions are compared (gold, or else the reward)."""
    judge: str
    components: dict[str, dict[str, float]]
    """Reward -> prompt id -> its calibrated score, before combination and truncation."""
    response_tokens: dict[str, int]
    """Prompt id -> length of the response."""


def sample(
    rollouts: RolloutPool, prompts: Sequence[Prompt], config: RunConfig, *, policy_version: int
) -> list[Finished]:
    """Sample one response a prompt with a version that the workers hold, in the order of the prompts.

    The seeds are the same for every version, so that versions are compared on equal terms.
    """
    requests = schedule.requests(prompts, config, round=0, iteration=EVALUATION, samples=1)
    finished = {f.meta.key: f for f in rollouts.generate(requests, policy_version=policy_version)}
    return [finished[request.key] for request in requests]


def score(scoring: ScoringPool, responses: Sequence[Finished], *, policy_version: int) -> Evaluation:
    """Score a version's responses with the reward models of now."""
    scoring.begin([finished.meta.key for finished in responses])
    for finished in responses:
        scoring.add(finished)
    return summarise(scoring.collect(), policy_version=policy_version)


def summarise(batch: ScoredReferences, *, policy_version: int) -> Evaluation:
    """Reduce a scored batch to an evaluation."""
    summary, metas = batch.summary, batch.metas
    gold = summary.gold.get(GOLD)
    judged: Mapping[RolloutKey, float] = summary.scores if gold is None else gold
    values = {
        "score_mean": float(np.mean(list(summary.scores.values()))),
        "kl_k1_per_sequence": float(np.mean(list(summary.kl_nats.values()))),
        "kl_k1_sem": float(np.std(list(summary.kl_nats.values())) / np.sqrt(len(metas))),
        "response_tokens_mean": float(np.mean([meta.response_tokens for meta in metas])),
        "truncated_fraction": float(np.mean([meta.finish_reason == "length" for meta in metas])),
    }
    values |= {f"{name}_mean": float(np.mean(list(scores.values()))) for name, scores in summary.gold.items()}
    return Evaluation(
        policy_version=policy_version,
        summary=values,
        judged={key.prompt_id: value for key, value in judged.items()},
        judge="score" if gold is None else GOLD,
        components={
            name: {key.prompt_id: value for key, value in scores.items()} for name, scores in summary.components.items()
        },
        response_tokens={meta.key.prompt_id: meta.response_tokens for meta in metas},
    )


def win_rate(
    after: Mapping[str, float], before: Mapping[str, float], *, resamples: int, seed: int
) -> tuple[float, tuple[float, float]]:
    """Compute how often one version beats another on the same prompts, with a 95% bootstrap interval over prompts.

    A tie counts half.

    Args:
        after: Prompt id -> score of the version in question.
        before: Prompt id -> score of the version it is compared with.
        resamples: Bootstrap resamples.
        seed: The seed of the bootstrap.

    Returns:
        The win rate and the 2.5% and 97.5% percentiles of its resamples.

    Raises:
        ValueError: If the prompts differ.
    """
    if after.keys() != before.keys() or not after:
        raise ValueError("a win rate needs the same prompts on both sides, and at least one")
    difference = np.array([after[prompt] - before[prompt] for prompt in sorted(after)])
    wins = np.where(difference > 0, 1.0, np.where(difference < 0, 0.0, 0.5))
    rng = np.random.default_rng(seed)
    means = wins[rng.integers(0, len(wins), size=(resamples, len(wins)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(wins.mean()), (float(low), float(high))


def compare(before: Evaluation, after: Evaluation, config: RunConfig) -> dict[str, Any]:
    """Put two evaluations side by side, as evaluation.json holds them."""
    rate, interval = win_rate(
        after.judged, before.judged, resamples=config.rounds.evaluation.bootstrap_resamples, seed=config.run.seed
    )
    return {
        "num_prompts": len(after.judged),
        "judge": after.judge,
        "before": {"policy_version": before.policy_version, **before.summary, "win_rate": 0.5},
        "after": {
            "policy_version": after.policy_version,
            **after.summary,
            "win_rate": rate,
            "win_rate_ci95": list(interval),
        },
    }
