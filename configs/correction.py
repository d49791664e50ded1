"""What the loss makes of samples that another policy drew."""

from typing import Literal, Self

from pydantic import model_validator

from configs.base import PositiveFloat, Section


class CorrectionConfig(Section):
    """What the loss makes of samples that another policy drew: an older version, or the engine's other numerics.

    w_t = pi_old / mu, where mu is the policy as the engine ran it and pi_old the learner's before the first step.
    """

    weight: Literal["none", "full", "tis", "clamp", "icepop", "sequence_mask", "sequence_tis"] = "none"
    """What every token's loss is multiplied by. `full`: w, which makes PPO the decoupled PPO; `tis`: min(w, high);
    `clamp`: w within [low, high]; `icepop`: w, but 0 outside [low, high]; `sequence_mask`: w, but 0 for responses whose
    geometric mean of w is outside [low, high]; `sequence_tis`: min(product over the response, high). APA and AWR, which
    have no ratio, take it for tokens of older versions only."""
    low: PositiveFloat = 0.5
    high: PositiveFloat = 2.0
    old_policy: Literal["recomputed", "behavior"] = "recomputed"
    """What PPO's ratio is taken against: the learner's own log-probs from before the first step, or (`behavior`, called
    bypass) those that the engine recorded."""
    alarm_k3: PositiveFloat = 1e-3
    """An incident is written where the mean k3 between engine and learner, over tokens of this very version, is above
    this."""

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be less than high = {self.high}")
        if self.old_policy == "behavior" and self.weight != "none":
            raise ValueError(
                f"weight = {self.weight} with old_policy = behavior would count the same ratio twice: pi / mu already "
                "holds pi_old / mu; choose one of the two"
            )
        return self
