"""Comparisons as arrays, in an order of their own, so that nothing depends on the order in which they came."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward_service import bradley_terry as bt
from reward_service.bradley_terry import Floats, Ints, WinCounts
from reward_service.ladder_records import Comparison, DisconnectedError, LadderError


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonLog:
    """The comparisons as arrays."""

    comparisons: tuple[Comparison, ...]
    versions: tuple[str, ...]
    anchor: int
    sides: Ints
    """[N, 2] first and second."""
    prompts: Ints
    """[N]."""
    num_prompts: int
    outcomes: Floats
    """[N]."""
    weights: Floats
    """[N]."""
    counts: WinCounts
    sha256: str


def read(comparisons: Sequence[Comparison], anchor: str) -> ComparisonLog:
    """Sort the comparisons, number their versions and prompts, and check that they make one ladder.

    Raises:
        DisconnectedError: If the comparisons fall into groups of versions that never met.
        LadderError: If there are no comparisons, fewer than two prompts, or none with the anchor.
    """
    lines = sorted((comparison.line(), place) for place, comparison in enumerate(comparisons))
    ordered = tuple(comparisons[place] for _, place in lines)
    versions = tuple(sorted({c.first for c in ordered} | {c.second for c in ordered}))
    prompt_ids = sorted({c.prompt_id for c in ordered})
    if not ordered:
        raise LadderError("there are no comparisons")
    if anchor not in versions:
        raise LadderError(f"the anchor {anchor} is in no comparison; compared are {', '.join(versions)}")
    if len(prompt_ids) < 2:
        raise LadderError("all comparisons are on one prompt; an interval over prompts needs at least two")
    version_at = {version: place for place, version in enumerate(versions)}
    prompt_at = {prompt_id: place for place, prompt_id in enumerate(prompt_ids)}
    sides = np.array([(version_at[c.first], version_at[c.second]) for c in ordered])
    prompts = np.array([prompt_at[c.prompt_id] for c in ordered])
    outcomes = np.array([c.outcome for c in ordered], np.float64)
    weights = np.array([c.weight for c in ordered], np.float64)
    counts = bt.count_wins(sides, outcomes, weights=weights, prompts=prompts, num_versions=len(versions))
    groups = bt.connected_groups(counts.directions, len(versions))
    if len(groups) > 1:
        raise DisconnectedError([[versions[version] for version in group] for group in groups])
    return ComparisonLog(
        comparisons=ordered,
        versions=versions,
        anchor=version_at[anchor],
        sides=sides,
        prompts=prompts,
        num_prompts=len(prompt_ids),
        outcomes=outcomes,
        weights=weights,
        counts=counts,
        sha256=hashlib.sha256("\n".join(line for line, _ in lines).encode()).hexdigest(),
    )
