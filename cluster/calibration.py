"""The zero and the unit of every reward, fixed once on samples of the reference policy and kept with the run.

Clip, truncation penalty, kl_beta and apa_lambda are in units of the score, so a score must have some: mean 0 and
standard deviation 1 on reference samples (algorithms: reward-model normalisation, anchor `ref_policy`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from learner.export import store_calibration
from protocol.messages import Prompt
from reward_service import scoring
from reward_service.scoring import Calibration

ANCHOR = "ref_policy"


def calibrate(
    raw: Mapping[str, NDArray[np.float32]], config: RunConfig, *, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """Compute gain and bias of every reward that is normalised.

    Args:
        raw: Component name -> [B] raw scores of reference samples.
        config: The run's configuration.
        prompts: The prompts of the samples.

    Returns:
        Component name -> gain, bias, anchor, number of samples, and the hash of the prompt set.
    """
    sha256 = hashlib.sha256("\n".join(sorted(prompt.prompt_id for prompt in prompts)).encode()).hexdigest()
    result: dict[str, dict[str, Any]] = {}
    plain = {
        reward.name
        for reward in config.scoring.rewards
        if not isinstance(reward, ModelRewardConfig) and reward.normalization == "none"
    }
    for name, scores in raw.items():
        if name not in plain:
            found = scoring.calibrate(scores)
            result[name] = {
                "gain": found.gain,
                "bias": found.bias,
                "anchor": ANCHOR,
                "num_responses": len(scores),
                "prompts_sha256": sha256,
            }
    return result


def store_with_model(calibrations: Mapping[str, Mapping[str, Any]], config: RunConfig, directory: Path) -> None:
    """Keep the trained reward model's constants in its own directory, so that it carries its unit with it."""
    for reward in config.scoring.rewards:
        if isinstance(reward, ModelRewardConfig) and reward.path == "trained":
            store_calibration(directory, **calibrations[reward.name])


def parse(calibrations: Mapping[str, Mapping[str, Any]]) -> dict[str, Calibration]:
    """Read gain and bias back from what `calibrate` returned."""
    return {name: Calibration(gain=values["gain"], bias=values["bias"]) for name, values in calibrations.items()}
