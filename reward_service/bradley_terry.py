"""Bradley-Terry by maximum likelihood, on counts, for many resamples at once. Pure arrays.

Everything is one form: a win of i over j is a row x = e_i - e_j (the anchor's column left out) with a weight, and

    log-likelihood = sum_d w_d log sigma(x_d . beta)

A tie is half a win each way: two rows of half the weight. A covariate is one more column.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ELO_PER_LOGIT = 400 / float(np.log(10))
"""173.71779276: one unit of log-odds on the Elo scale."""

_MAX_STEPS = 200
_MAX_HALVINGS = 50
_STEP_TOLERANCE = 1e-10


def sigmoid(x: Floats) -> Floats:
    """Compute 1 / (1 + exp(-x)) without overflow."""
    return cast(Floats, special.expit(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class WinCounts:
    """Who beat whom, prompt by prompt."""

    num_versions: int
    directions: Ints
    """[D, 2] (winner, loser): both directions of every pair that was compared."""
    wins: Floats
    """[P, D] weight of the wins on each prompt; a tie is half a win in both directions."""

    @property
    def totals(self) -> Floats:
        """[D] wins over all prompts."""
        return self.wins.sum(axis=0)

    def between(self, winner: int, loser: int) -> Floats:
        """Return [P] wins of one version over another that it was compared with."""
        place = int(np.flatnonzero((self.directions == (winner, loser)).all(axis=1))[0])
        return self.wins[:, place]


def count_wins(sides: Ints, outcomes: Floats, *, weights: Floats, prompts: Ints, num_versions: int) -> WinCounts:
    """Add up comparisons.

    Args:
        sides: [N, 2] the two versions.
        outcomes: [N] share of the win that the first one gets, 0 to 1.
        weights: [N].
        prompts: [N] index of each comparison's prompt.
        num_versions: K.

    Returns:
        The counts.
    """
    forward = sides[:, 0] * num_versions + sides[:, 1]
    backward = sides[:, 1] * num_versions + sides[:, 0]
    codes = np.unique(np.concatenate([forward, backward]))
    wins = np.zeros((int(prompts.max()) + 1, len(codes)))
    np.add.at(wins, (prompts, np.searchsorted(codes, forward)), weights * outcomes)
    np.add.at(wins, (prompts, np.searchsorted(codes, backward)), weights * (1 - outcomes))
    directions = np.stack([codes // num_versions, codes % num_versions], axis=1)
    return WinCounts(num_versions=num_versions, directions=directions, wins=wins)


def design(directions: Ints, *, num_versions: int, anchor: int) -> Floats:
    """Return [D, K - 1] rows e_winner - e_loser without the anchor's column, so that theta_anchor = 0."""
    rows = np.zeros((len(directions), num_versions))
    places = np.arange(len(directions))
    rows[places, directions[:, 0]] += 1
    rows[places, directions[:, 1]] -= 1
    return np.delete(rows, anchor, axis=1)


def reachable(edges: Bools) -> Bools:
    """Return where one node is reached from another along directed edges; every node reaches itself.

    Args:
        edges: [..., K, K], True where an edge leads from row to column.

    Returns:
        [..., K, K], True where a path leads from row to column.
    """
    nodes = edges.shape[-1]
    reached = edges | np.eye(nodes, dtype=np.bool_)
    for _ in range(max(1, int(np.ceil(np.log2(nodes))))):
        steps = reached.astype(np.float32)
        reached = (steps @ steps) > 0
    return reached


def connected_groups(directions: Ints, num_versions: int) -> list[list[int]]:
    """Return the groups of versions that comparisons connect, each sorted; one group means one scale."""
    edges = np.zeros((num_versions, num_versions), np.bool_)
    edges[directions[:, 0], directions[:, 1]] = True
    edges[directions[:, 1], directions[:, 0]] = True
    groups = {tuple(np.flatnonzero(row).tolist()) for row in reachable(edges)}
    return [list(group) for group in sorted(groups)]


def pseudo_wins(wins: Floats, directions: Ints, *, num_versions: int, strength: float = 0.5) -> Floats:
    """Return the wins to add, each way, so that a maximum exists.

    It exists where the win digraph is strongly connected, that is, where the versions cannot be parted into two sides
    of which one won everything (Ford 1957). Pairs that lie in different strong components get them, and no others:
    every such pair was decided one way only, and with an edge each way the digraph becomes strongly connected.

    Args:
        wins: [..., D].
        directions: [D, 2] every pair both ways; a connected graph.
        num_versions: K.
        strength: Wins to add in each direction.

    Returns:
        [..., D]; zeros where a maximum exists already.
    """
    winner, loser = directions[:, 0], directions[:, 1]
    beats = np.zeros((*wins.shape[:-1], num_versions, num_versions), np.bool_)
    beats[..., winner, loser] = wins > 0
    reached = reachable(beats)
    mutual = reached & np.swapaxes(reached, -1, -2)
    return np.where(mutual[..., winner, loser], 0.0, strength)


def maximise(rows: Floats, weights: Floats) -> Floats:
    """Find the maximum of the log-likelihood by Newton's method, for every resample at once.

        beta = argmax sum_d w_d log sigma(x_d . beta)

    Args:
        rows: [D, F].
        weights: [B, D], each such that a finite maximum exists (`pseudo_wins`).

    Returns:
        [B, F].

    Raises:
        ArithmeticError: If it does not converge.
    """
    beta = np.zeros((len(weights), rows.shape[1]))
    value = log_likelihood(rows, weights, beta)
    for _ in range(_MAX_STEPS):
        gradient = (weights * sigmoid(-(beta @ rows.T))) @ rows
        step = np.linalg.solve(information(rows, weights, beta), gradient[..., None])[..., 0]
        candidate = beta + step
        for _ in range(_MAX_HALVINGS):
            # Rounding alone may lower the value a little once the maximum is reached.
            worse = log_likelihood(rows, weights, candidate) < value - 1e-10 * (1 + np.abs(value))
            if not worse.any():
                break
            step = np.where(worse[:, None], step / 2, step)
            candidate = beta + step
        beta, value = candidate, log_likelihood(rows, weights, candidate)
        if np.abs(step).max() < _STEP_TOLERANCE:
            return beta
    raise ArithmeticError(f"the Bradley-Terry fit did not converge in {_MAX_STEPS} steps")


def log_likelihood(rows: Floats, weights: Floats, beta: Floats) -> Floats:
    """Compute sum_d w_d log sigma(x_d . beta).

    Args:
        rows: [D, F].
        weights: [B, D].
        beta: [B, F].

    Returns:
        [B].
    """
    return -(weights * np.logaddexp(0, -(beta @ rows.T))).sum(axis=-1)


def information(rows: Floats, weights: Floats, beta: Floats) -> Floats:
    """Compute the Fisher information sum_d w_d p_d (1 - p_d) x_d x_d^T with p_d = sigma(x_d . beta).

    Args:
        rows: [D, F].
        weights: [B, D].
        beta: [B, F].

    Returns:
        [B, F, F].
    """
    features = rows.shape[1]
    p = sigmoid(beta @ rows.T)
    outer = (rows[:, :, None] * rows[:, None, :]).reshape(len(rows), features * features)
    return ((weights * p * (1 - p)) @ outer).reshape(-1, features, features)


def row_scores(rows: Floats, beta: Floats) -> Floats:
    """Return [D, F] each row's gradient of log sigma(x_d . beta), which is (1 - p_d) x_d."""
    return sigmoid(-(rows @ beta))[:, None] * rows


def sandwich(information: Floats, scores: Floats, *, num_clusters: int) -> Floats:
    """Compute the covariance of an estimate whose observations depend on each other within clusters.

        V = I^-1 (G / (G - 1) sum_g s_g s_g^T) I^-1

    Source: Liang and Zeger (1986); the correction G / (G - 1) as in Cameron and Miller (2015), eq. 11-12.

    Args:
        information: [F, F].
        scores: [G', F] each cluster's gradient of the log-likelihood at the estimate; pseudo-wins are clusters too.
        num_clusters: G, real clusters; at least 2.

    Returns:
        [F, F].
    """
    bread = np.linalg.inv(information)
    return bread @ (num_clusters / (num_clusters - 1) * (scores.T @ scores)) @ bread


def bootstrap(counts: WinCounts, rows: Floats, *, resamples: int, seed: int, strength: float = 0.5) -> Floats:
    """Fit resamples of the prompts; a resample without a maximum gets pseudo-wins as the data itself would.

    Args:
        counts: The wins.
        rows: [D, K - 1] from `design`.
        resamples: B.
        seed: Of the resampling.
        strength: Pseudo-wins in each direction.

    Returns:
        [B, K - 1] estimates.
    """
    num_prompts = len(counts.wins)
    rng = np.random.default_rng(seed)
    chosen = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples)
    wins = chosen @ counts.wins
    wins += pseudo_wins(wins, counts.directions, num_versions=counts.num_versions, strength=strength)
    return maximise(rows, wins)


def quantile(confidence: float, num_clusters: int) -> float:
    """Return the two-sided quantile of Student's t with G - 1 degrees of freedom: wide where prompts are few."""
    return float(cast(float, special.stdtrit(max(num_clusters - 1, 1), (1 + confidence) / 2)))


def share_interval(won: Floats, weights: Floats, *, confidence: float) -> tuple[float, tuple[float, float]]:
    """Compute a share and its interval, where observations depend on each other within prompts.

    Wilson's interval with the effective number n* = p (1 - p) / V, V the cluster-robust variance of the share; where
    all prompts agree, and V says nothing, n* = (sum w)^2 / sum w^2 (Kish).

    Args:
        won: [P] what each prompt contributed to the share, at most its weight.
        weights: [P] its weight; prompts without any are left out.
        confidence: Such as 0.95.

    Returns:
        The share, and the low and high end.
    """
    won, weights = won[weights > 0], weights[weights > 0]
    total, prompts = weights.sum(), len(weights)
    share = float(won.sum() / total)
    variance = float(np.square(won - share * weights).sum()) / total**2 * prompts / max(prompts - 1, 1)
    effective = share * (1 - share) / variance if variance > 1e-15 else total**2 / np.square(weights).sum()
    ratio = quantile(confidence, prompts) ** 2 / effective
    centre = (share + ratio / 2) / (1 + ratio)
    half = float(np.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio))
    return share, (max(0.0, float(centre) - half), min(1.0, float(centre) + half))
