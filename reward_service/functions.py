"""Rewards that are Python functions, and every configured reward that reads text."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from configs.run import RunConfig
from configs.scoring import FunctionRewardConfig, ModelRewardConfig
from protocol.errors import UserError
from protocol.messages import FloatArray
from reward_service.endpoint import HTTPReward
from reward_service.scoring import RewardError, require_scores
from reward_service.text_batch import TextBatch, TextReward, batch_saved_on_failure

GOLD = "gold"

RewardFunction = Callable[..., Sequence[float]]
"""f(prompts=[str], responses=[str], finish_reasons=[str], metadata=[dict]) -> one float for each response."""


class FunctionReward:
    """A reward by dotted path.

    Args:
        name: The component's name.
        path: `package.module:function`.
        incident_dir: Where the batch is kept when the function fails.

    Raises:
        UserError: If there is no such function.
    """

    def __init__(self, *, name: str, path: str, incident_dir: Path) -> None:
        self.name = name
        self._function = import_function(path, component=name)
        self._incident_dir = incident_dir

    def raw_scores(self, batch: TextBatch) -> FloatArray:
        """Call the function once for the whole batch.

        Args:
            batch: Prompts and responses.

        Returns:
            [B] raw scores, float32.

        Raises:
            RewardError: If the function raises, or returns anything but one finite number for each response.
        """
        with batch_saved_on_failure(batch, incident_dir=self._incident_dir):
            try:
                raw = self._function(**batch.arguments())
            except Exception as error:
                # The function is somebody else's code: here is the border where its faults get the reward's name.
                raise RewardError(
                    f"it raised {type(error).__name__}: {error} (on {len(batch.keys)} responses from this one on)",
                    component=self.name,
                    key=batch.keys[0],
                ) from error
            return require_scores(raw, component=self.name, keys=batch.keys)


def import_function(path: str, *, component: str) -> RewardFunction:
    """Import a function by dotted path.

    Args:
        path: `package.module:function`.
        component: Who wants it, for the error.

    Returns:
        The function.

    Raises:
        UserError: If the module cannot be imported or holds no such function.
    """
    module_name, _, name = path.partition(":")
    where = f"reward {component}"
    try:
        function = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise UserError(
            f"{path} cannot be imported: {error}",
            where=where,
            next_step="check the path; the module must be importable where the scoring workers run",
        ) from error
    except AttributeError as error:
        raise UserError(f"{module_name} has no {name}", where=where, next_step="check the path") from error
    if not callable(function):
        raise UserError(f"{path} is a {type(function).__name__}, not a function", where=where)
    return cast(RewardFunction, function)


def text_rewards(config: RunConfig, incident_dir: Path) -> dict[str, TextReward]:
    """Make the configured rewards that read text: functions and endpoints, by name."""
    rewards: dict[str, TextReward] = {}
    for reward in config.scoring.rewards:
        if isinstance(reward, FunctionRewardConfig):
            rewards[reward.name] = FunctionReward(name=reward.name, path=reward.path, incident_dir=incident_dir)
        elif not isinstance(reward, ModelRewardConfig):
            rewards[reward.name] = HTTPReward(reward, incident_dir=incident_dir)
    return rewards


def gold_functions(config: RunConfig, incident_dir: Path) -> tuple[FunctionReward, ...]:
    """Make the gold functions, the total first; none where the configuration names none."""
    gold = config.scoring.gold
    if gold is None:
        return ()
    paths = {GOLD: gold.path, **gold.components}
    return tuple(FunctionReward(name=name, path=path, incident_dir=incident_dir) for name, path in paths.items())
