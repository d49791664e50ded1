"""Alarms that end a round before it does harm. A pure function of the round's metrics."""

from collections.abc import Mapping, Sequence

from configs.rounds import GuardsConfig
from protocol import metrics as names

History = Sequence[Mapping[str, float]]
"""The metrics of a round's iterations so far, oldest first."""


def alarm(history: History, guards: GuardsConfig) -> str | None:
    """Compare the last iterations with the guards' bounds.

    A figure is its mean over the last `window_iterations`; a start is the round's first iteration.

    Args:
        history: The round so far.
        guards: The bounds; those that are not set are not looked at.

    Returns:
        Why the round should end, or None.
    """
    for name, bound, figure, grows in _figures(history, guards):
        if figure > bound if grows else figure < bound:
            side = "above" if grows else "below"
            return f"{name} = {figure:.4g} is {side} its bound of {bound:.4g}"
    return None


def _figures(history: History, guards: GuardsConfig) -> list[tuple[str, float, float, bool]]:
    """List what is watched: its name, its bound, its figure, and whether growing is what is bad."""
    start, window = history[0], history[-guards.window_iterations :]

    def mean(name: str) -> float:
        return sum(metrics[name] for metrics in window) / len(window)

    found: list[tuple[str, float, float, bool]] = []
    if guards.kl_nats_per_sequence is not None:
        found.append(("KL (nats a sequence)", guards.kl_nats_per_sequence, mean(names.OBJECTIVE_KL), True))
    if guards.heldout_gap is not None and names.HELDOUT_GAP in start:
        rise = mean(names.HELDOUT_GAP) - start[names.HELDOUT_GAP]
        found.append(("rise of score minus held-out score", guards.heldout_gap, rise, True))
    if guards.response_tokens_factor is not None:
        factor = mean(names.ROLLOUT_TOKENS_MEAN) / start[names.ROLLOUT_TOKENS_MEAN]
        found.append(("response length over the round's start", guards.response_tokens_factor, factor, True))
    if guards.repetition_fraction is not None:
        found.append(("share of repeated 3-grams", guards.repetition_fraction, mean(names.ROLLOUT_REPEATED), True))
    if guards.entropy_nats is not None:
        found.append(("entropy (nats a token)", guards.entropy_nats, mean(names.POLICY_ENTROPY), False))
    return found
