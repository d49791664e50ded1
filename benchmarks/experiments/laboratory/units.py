"""Controllers that are fed a KL in the wrong unit, as published code has done. Production code refuses this by type."""

from typing import Any, Literal

import numpy as np
import torch

from benchmarks.experiments.laboratory.sampling import released_kl
from learner.ops.kl import AdaptiveKLController, SequenceKL
from learner.update import Updater
from protocol.messages import ScoredBatch, UpdateReport

WrongUnit = Literal["k1_per_token", "released"]
"""The mean log-ratio per response token; or what the released APA code computes, `sampling.released_kl`."""


class WrongUnitController(AdaptiveKLController):
    """Takes a number per token for the KL per sequence.

    Args:
        right: The controller it stands in for.
    """

    def __init__(self, right: AdaptiveKLController) -> None:
        super().__init__(right.config, initial_beta=right.beta)
        self.mistaken_nats = 0.0
        """What the next update takes for the KL of the batch."""

    def update(self, kl: SequenceKL) -> None:
        """Move the coefficient by the mistaken number; only the number of sequences is taken from the real one."""
        super().update(SequenceKL(nats=self.mistaken_nats, num_sequences=kl.num_sequences))


class PerTokenUpdater(Updater):
    """The real Updater with a controller that is fed the wrong unit.

    Args:
        unit: Which number it is fed.
        parts: As `Updater` takes them.

    Raises:
        ValueError: If the algorithm has no adaptive controller.
    """

    def __init__(self, *, unit: WrongUnit, **parts: Any) -> None:
        super().__init__(**parts)
        if not isinstance(self.controller, AdaptiveKLController):
            raise ValueError("only an adaptive controller can be fed a wrong unit")
        self._unit: WrongUnit = unit
        self._mistaken = self.controller = WrongUnitController(self.controller)

    def update(self, batch: ScoredBatch) -> UpdateReport:
        """Learn from a batch, after telling the controller the wrong number of it."""
        self._mistaken.mistaken_nats = mistaken_kl(batch, unit=self._unit)
        return super().update(batch)


def mistaken_kl(batch: ScoredBatch, *, unit: WrongUnit) -> float:
    """Compute what is taken for the KL per sequence.

    Args:
        batch: Whose behaviour log-probs are the policy's.
        unit: Which mistake.

    Returns:
        Nats per token, or what the released code computes.
    """
    recorded = [one.rollout.behavior_logprobs for one in batch.rollouts]
    own = torch.from_numpy(np.concatenate([logprobs for logprobs in recorded if logprobs is not None]))
    ref = torch.from_numpy(np.concatenate([one.ref_logprobs for one in batch.rollouts]))
    if unit == "k1_per_token":
        return float((own - ref).double().mean())
    columns = max(one.rollout.num_tokens for one in batch.rollouts) - 1
    return released_kl(own, ref, num_rows=len(batch.rollouts), num_columns=columns)
