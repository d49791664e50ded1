"""The ladder: where each policy version stands, with intervals, from the comparisons alone.

A ladder is a pure function of its comparisons and its seed: the order in which labels came does not matter, which is
why ratings are fitted (Bradley-Terry) and not updated one game at a time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np

from reward_service import bradley_terry as bt
from reward_service.bradley_terry import ELO_PER_LOGIT, Floats, Ints
from reward_service.comparison_log import ComparisonLog, read
from reward_service.ladder_records import (
    Comparison,
    ControlledRating,
    DisconnectedError,
    Drift,
    Interval,
    Ladder,
    LadderError,
    Lead,
    LengthControl,
    Pair,
    PositionBias,
    Rating,
)
from reward_service.length_control import control_length

__all__ = [
    "Comparison",
    "ControlledRating",
    "DisconnectedError",
    "Drift",
    "Ladder",
    "LadderError",
    "Lead",
    "LengthControl",
    "Pair",
    "PositionBias",
    "Rating",
    "drift",
    "fit_ladder",
    "lead",
    "predicted_elo",
]


def fit_ladder(
    comparisons: Sequence[Comparison],
    *,
    anchor: str,
    confidence: float = 0.95,
    bootstrap_resamples: int = 1000,
    seed: int = 0,
    pseudo_wins: float = 0.5,
) -> Ladder:
    """Fit the ratings of all versions by maximum likelihood.

        theta = argmax sum_k w_k [y_k log sigma(theta_first - theta_second) + (1 - y_k) log sigma(theta_second -
        theta_first)],  theta_anchor = 0,  Elo = 400 / ln 10 theta

    Where some versions won everything against the others there is no finite maximum: pairs between them get pseudo-wins
    each way, and no interval is narrower than the cluster-robust one or the inverse Fisher information's.

    Source: Bradley and Terry (1952); ties as half wins, the length covariate as in AlpacaEval 2 (Dubois et al. 2024).

    Args:
        comparisons: At least two prompts; intervals are over prompts, because labels on one prompt agree.
        anchor: The version at 0.
        confidence: Of all intervals.
        bootstrap_resamples: Resamples of the prompts.
        seed: Of the bootstrap.
        pseudo_wins: Wins each way for pairs that need them.

    Returns:
        The ladder.

    Raises:
        DisconnectedError: If the comparisons fall into groups of versions that never met.
        LadderError: If there are no comparisons, fewer than two prompts, or none with the anchor.
        ValueError: If the confidence is not between 0 and 1, or a number that must be positive is not.
    """
    if not 0 < confidence < 1 or bootstrap_resamples < 1 or pseudo_wins <= 0:
        raise ValueError("confidence lies between 0 and 1; bootstrap_resamples and pseudo_wins are positive")
    log = read(comparisons, anchor)
    num_versions = len(log.versions)
    rows = bt.design(log.counts.directions, num_versions=num_versions, anchor=log.anchor)
    totals = log.counts.totals
    added = bt.pseudo_wins(totals, log.counts.directions, num_versions=num_versions, strength=pseudo_wins)
    fit = _fit(rows, totals + added, scores=log.counts.wins, added=added)
    draws = bt.bootstrap(log.counts, rows, resamples=bootstrap_resamples, seed=seed, strength=pseudo_wins)
    theta = np.insert(fit.beta, log.anchor, 0.0)
    order = sorted(range(num_versions), key=lambda version: (-theta[version], log.versions[version]))
    against_anchor = [(version, log.anchor) for version in order]
    between = list(combinations(order, 2))
    leads = _leads(log, [*against_anchor, *between], fit, draws, confidence)
    tallies = _tallies(log)
    return Ladder(
        anchor=anchor,
        ratings=tuple(_rating(tallies[v].sum(axis=0), leads[v, log.anchor], float(theta[v])) for v in order),
        pairs=tuple(_pair(log, tallies, leads[pair], pair, confidence) for pair in between),
        log_likelihood=float(bt.log_likelihood(rows, totals[None], fit.beta[None])[0]),
        position_bias=_position_bias(log, confidence),
        length_controlled=control_length(log, added=added, confidence=confidence),
        separable=bool(added.any()),
        num_comparisons=len(log.comparisons),
        num_prompts=log.num_prompts,
        judges=dict(sorted(Counter(comparison.judge for comparison in log.comparisons).items())),
        confidence=confidence,
        bootstrap_resamples=bootstrap_resamples,
        seed=seed,
        comparisons_sha256=log.sha256,
    )


def lead(ladder: Ladder, version: str, *, over: str) -> Lead:
    """Find how far one version is above another.

    Raises:
        KeyError: If one of them is not on the ladder, or both are the same.
    """
    for pair in ladder.pairs:
        if (pair.version, pair.over) == (version, over):
            return pair.lead
        if (pair.version, pair.over) == (over, version):
            return pair.lead.turned()
    raise KeyError(f"{version} over {over}")


def predicted_elo(score_gaps: Sequence[float]) -> float:
    """Translate gaps of reward-model scores to the lead that they promise.

        400 log10(p / (1 - p)),  p = mean over prompts of sigma(gap)

    For one gap this is 400 / ln 10 gap (Bai et al. 2022, 2.4). Gaps differ from prompt to prompt, and a ladder sees how
    often a version wins: the Elo of the mean gap would be far more than even a perfect reward model's labels measure.

    Args:
        score_gaps: A gap for each prompt, in log-odds.
    """
    gaps = np.asarray(score_gaps, dtype=np.float64)
    # log(p / (1 - p)) of means of sigma(gap) and sigma(-gap), each as a logarithm: neither vanishes.
    log_odds = np.logaddexp.reduce(-np.logaddexp(0.0, -gaps)) - np.logaddexp.reduce(-np.logaddexp(0.0, gaps))
    return float(ELO_PER_LOGIT * log_odds)


def drift(ladder: Ladder, scores: Mapping[str, Mapping[str, float]], *, version: str, over: str) -> Drift:
    """Compare the lead that a reward model predicts with the measured one.

    Args:
        ladder: The measurement.
        scores: Version -> prompt -> score on the ladder's prompts, in the reward model's own unit (log-odds), that is,
            before any calibration.
        version: The newer version.
        over: What it is compared with.

    Returns:
        Both leads, with the alarm.

    Raises:
        KeyError: If a version has no score or is not on the ladder.
    """
    measured = lead(ladder, version, over=over)
    predicted = predicted_elo([score - scores[over][prompt] for prompt, score in scores[version].items()])
    return Drift(
        version=version,
        over=over,
        predicted_elo=predicted,
        measured_elo=measured.elo,
        ci=(measured.ci_low, measured.ci_high),
        alarm=predicted > measured.ci_high,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """An estimate with its two covariances."""

    beta: Floats
    """[F]."""
    fisher: Floats
    """[F, F] inverse information."""
    sandwich: Floats
    """[F, F]."""
    with_pseudo_wins: bool


def _fit(rows: Floats, weights: Floats, *, scores: Floats, added: Floats) -> _Fit:
    """Fit once, with the pseudo-wins as one more prompt of the sandwich.

    Args:
        rows: [D, F].
        weights: [D] wins, pseudo-wins included.
        scores: [P, D] wins on each prompt.
        added: [D] pseudo-wins.
    """
    beta = bt.maximise(rows, weights[None])
    information: Floats = bt.information(rows, weights[None], beta)[0]
    return _Fit(
        beta=beta[0],
        fisher=np.linalg.inv(information).astype(np.float64),
        sandwich=bt.sandwich(
            information,
            np.concatenate([scores, added[None]]) @ bt.row_scores(rows, beta[0]),
            num_clusters=len(scores),
        ),
        with_pseudo_wins=bool(added.any()),
    )


def _leads(
    log: ComparisonLog, pairs: Sequence[tuple[int, int]], fit: _Fit, draws: Floats, confidence: float
) -> dict[tuple[int, int], Lead]:
    """Compute the lead of each pair's first version over its second, all from the same fit and resamples."""
    contrasts = bt.design(np.array(pairs), num_versions=len(log.versions), anchor=log.anchor)
    elo = ELO_PER_LOGIT * contrasts @ fit.beta
    se_fisher, se_sandwich = (
        ELO_PER_LOGIT * np.sqrt(np.einsum("qf,fg,qg->q", contrasts, covariance, contrasts))
        for covariance in (fit.fisher, fit.sandwich)
    )
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    low, high = np.percentile(ELO_PER_LOGIT * draws @ contrasts.T, tails, axis=0)
    half = bt.quantile(confidence, log.num_prompts) * se_sandwich
    if fit.with_pseudo_wins:
        # All resamples of a clean sweep are clean sweeps, so resampling does not see how unsure it is.
        half = np.maximum(half, NormalDist().inv_cdf((1 + confidence) / 2) * se_fisher)
        low, high = np.minimum(low, elo - half), np.maximum(high, elo + half)
    return {
        pair: Lead(
            version=log.versions[pair[0]],
            over=log.versions[pair[1]],
            elo=float(elo[q]),
            se_elo=float(se_fisher[q]),
            ci=(float(low[q]), float(high[q])),
            ci_sandwich=(float(elo[q] - half[q]), float(elo[q] + half[q])),
        )
        for q, pair in enumerate(pairs)
    }


def _tallies(log: ComparisonLog) -> Ints:
    """Count [K, K, 3] wins, ties and losses of the row's version against the column's."""
    tallies = np.zeros((len(log.versions), len(log.versions), 3), np.int64)
    result = np.where(log.outcomes > 0.5, 0, np.where(log.outcomes == 0.5, 1, 2))
    np.add.at(tallies, (log.sides[:, 0], log.sides[:, 1], result), 1)
    np.add.at(tallies, (log.sides[:, 1], log.sides[:, 0], 2 - result), 1)
    return tallies


def _rating(tally: Ints, above_anchor: Lead, theta: float) -> Rating:
    wins, ties, losses = tally.tolist()
    return Rating(
        version=above_anchor.version,
        elo=above_anchor.elo,
        theta=theta,
        se_elo=above_anchor.se_elo,
        ci=above_anchor.ci,
        ci_sandwich=above_anchor.ci_sandwich,
        num_comparisons=wins + ties + losses,
        wins=wins,
        ties=ties,
        losses=losses,
    )


def _pair(log: ComparisonLog, tallies: Ints, leading: Lead, pair: tuple[int, int], confidence: float) -> Pair:
    wins, ties, losses = tallies[pair].tolist()
    rate: float | None = None
    interval: Interval | None = None
    if wins + ties + losses:
        won, lost = log.counts.between(*pair), log.counts.between(*pair[::-1])
        rate, interval = bt.share_interval(won, won + lost, confidence=confidence)
    return Pair(
        version=leading.version,
        over=leading.over,
        num_comparisons=wins + ties + losses,
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=rate,
        win_rate_ci=interval,
        lead=leading,
    )


def _position_bias(log: ComparisonLog, confidence: float) -> PositionBias | None:
    known = np.array([c.shown_first is not None for c in log.comparisons])
    if not known.any():
        return None
    straight = np.array([c.shown_first == c.first for c in log.comparisons])
    won_first = np.where(straight, log.outcomes, 1 - log.outcomes)
    weights, won = np.zeros(log.num_prompts), np.zeros(log.num_prompts)
    np.add.at(weights, log.prompts, log.weights * known)
    np.add.at(won, log.prompts, log.weights * known * won_first)
    share, interval = bt.share_interval(won, weights, confidence=confidence)
    return PositionBias(share=share, ci=interval, num_comparisons=int(known.sum()))
