"""What the loss makes of samples that another policy drew."""

from typing import Literal, Self

from pydantic import model_validator

from configs.base import PositiveFloat, Section

_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": (),
    "tis": ("high",),
    "clamp": ("low", "high"),
    "icepop": ("low", "high"),
    "sequence_mask": ("low", "high"),
    "sequence_tis": ("high",),
}
"""Weight -> the bounds that it reads."""


class CorrectionConfig(Section):
    """What the loss makes of samples that another policy drew: an older version, or the engine's other numerics.

    w_t = pi_old / mu, where mu is the policy as the engine ran it and pi_old the learner's before the first step.
    """

    weight: Literal["none", "full", "tis", "clamp", "icepop", "sequence_mask", "sequence_tis"] = "none"
    """What every token's loss is multiplied by. `full`: w, which makes PPO the decoupled PPO; `tis`: min(w, high);
    `clamp`: w within [low, high]; `icepop`: w, but 0 outside [low, high]; `sequence_mask`: w, but 0 for responses whose
    geometric mean of w is outside [low, high]; `sequence_tis`: min(product over the response, high). A run refuses all
    but `none` for APA and AWR, whose losses fit targets and have no ratio for it to complete."""
    low: PositiveFloat = 0.5
    """Of `clamp`, `icepop` and `sequence_mask`; 1 at most, which is w where engine and learner agree."""
    high: PositiveFloat = 2.0
    """Of all but `none` and `full`; 1 at least."""
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

    def trouble(self, *, is_truncated: bool) -> str | None:
        """Say what no run can mean by this; None where there is no such thing.

        Args:
            is_truncated: Whether sampling gives some tokens probability zero.
        """
        read = _READS[self.weight]
        for key, bound in (("low", self.low), ("high", self.high)):
            if key not in read and bound != type(self).model_fields[key].default:
                return f"{key} = {bound} is not read by weight = {self.weight}: leave it out"
        if ("low" in read and self.low > 1) or ("high" in read and self.high < 1):
            return (
                f"weight = {self.weight} with {' and '.join(f'{key} = {dict(self)[key]}' for key in read)} would drop "
                "or reweigh the policy's own fresh samples, whose ratio is 1: low must be at most 1 and high at least 1"
            )
        if is_truncated and (self.weight != "none" or self.old_policy == "behavior"):
            return (
                f"weight = {self.weight} with old_policy = {self.old_policy} takes ratios to the probabilities that "
                "were sampled with, and top_p < 1, top_k > 0 and greedy decoding sample from a truncated distribution, "
                "of which no ratio brings back the tokens that it lacks: use temperature alone, or weight = none with "
                "old_policy = recomputed"
            )
        return None
