"""The zero and the unit of every reward, fixed once on anchor responses and kept with the run.

Clip, truncation penalty, kl_beta and apa_lambda are in units of the score, so a score must have some: mean 0 and
standard deviation 1 on the anchor responses. These are samples of the reference policy (as in Ziegler et al. 2019),
demonstrations (as in Ouyang et al. 2022), or the fixed set that is learned from (the z-score of offline APA).
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from learner.export import store_calibration
from learner.supervised_loop import encode_pair
from protocol.datasets import ReadReport, read_demonstrations
from protocol.errors import UserError
from protocol.messages import NOT_SAMPLED, Prompt, Rollout, RolloutKey
from protocol.records import text_of
from reward_service import scoring
from reward_service.scoring import Calibration

_LOG = logging.getLogger(__name__)


def demonstrated(config: RunConfig, tokenizer: Any, *, iteration: int) -> list[Rollout]:
    """Read the first demonstrations, as the scoring workers take responses.

    Args:
        config: The run's configuration; it has demonstrations.
        tokenizer: The policy's.
        iteration: Of their keys.

    Returns:
        `scoring.calibration_responses` of them, or as many as there are.

    Raises:
        UserError: If fewer than two fit into the lengths of rollouts.
    """
    source = config.data.demonstrations
    assert source is not None
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    report = ReadReport(source=source.source)
    records = read_demonstrations(
        source.source, split=source.split, seed=config.run.seed, count=source.count, report=report
    )
    rollouts: list[Rollout] = []
    for number, record in enumerate(records, start=1):
        prompt_ids, response_ids = encode_pair(tokenizer, record.prompt, record.completion)
        if len(prompt_ids) + len(response_ids) > longest:
            report.drop(f"longer than {longest} tokens", f"demonstration {number}")
            continue
        name = f"demonstration-{number}"
        rollouts.append(
            Rollout(
                key=RolloutKey(0, iteration, name, 0),
                prompt=Prompt(prompt_id=name, token_ids=prompt_ids, text=text_of(record.prompt), source=record.prompt),
                response_ids=response_ids,
                behavior_logprobs=None,
                finish_reason="stop",
                policy_versions=NOT_SAMPLED,
                worker="demonstrations",
            )
        )
        if len(rollouts) == config.scoring.calibration_responses:
            break
    if len(rollouts) < 2:
        raise UserError(
            f"calibration needs two demonstrations or more, and {len(rollouts)} can be used: {report.summary()}",
            where="data.demonstrations",
            next_step="set scoring.calibration_anchor=ref_policy",
        )
    if report.num_dropped:
        _LOG.warning("calibration on demonstrations: %s", report.summary())
    return rollouts


def calibrate(
    raw: Mapping[str, NDArray[np.float32]], config: RunConfig, *, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """Compute gain and bias of every reward that is normalised.

    Args:
        raw: Component name -> [B] raw scores of the anchor responses.
        config: The run's configuration.
        prompts: The prompts that they answer.

    Returns:
        Component name -> gain, bias, anchor, number of samples, and the hash of the prompt set.

    Raises:
        UserError: If a reward gives all responses (almost) the same score.
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
            try:
                found = scoring.calibrate(scores)
            except ValueError as problem:
                raise UserError(
                    f"the reward {name} has no unit of its own",
                    where="scoring.calibration_anchor",
                    cause=str(problem),
                    next_step="let it tell responses apart, or give a function or endpoint `normalization: none`",
                ) from problem
            result[name] = {
                "gain": found.gain,
                "bias": found.bias,
                "anchor": config.scoring.calibration_anchor,
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
