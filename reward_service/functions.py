"""Rewards that are Python functions or HTTP endpoints: they read text and give one number for each response."""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httpx
import tenacity

from configs.run import RunConfig
from configs.scoring import FunctionRewardConfig, HTTPRewardConfig, ModelRewardConfig
from protocol.errors import UserError
from protocol.messages import FinishReason, FloatArray, RolloutKey
from reward_service.scoring import RewardError, require_scores

GOLD = "gold"

RewardFunction = Callable[..., Sequence[float]]
"""f(prompts=[str], responses=[str], finish_reasons=[str], metadata=[dict]) -> one float for each response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """A group of responses as text, in the group's order."""

    keys: tuple[RolloutKey, ...]
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    metadata: tuple[Mapping[str, str], ...]

    def arguments(self) -> dict[str, list[Any]]:
        """Return what a reward function is called with."""
        return {
            "prompts": list(self.prompts),
            "responses": list(self.responses),
            "finish_reasons": list(self.finish_reasons),
            "metadata": [dict(row) for row in self.metadata],
        }


class TextReward(Protocol):
    """A reward that reads text."""

    @property
    def name(self) -> str:
        """The component's name in the configuration."""
        ...

    def raw_scores(self, batch: TextBatch) -> FloatArray:
        """Return [B] raw scores, or raise a RewardError."""
        ...


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


class HTTPReward:
    """A reward from an HTTP endpoint that takes and returns JSON.

    It posts {"keys", "prompts", "responses", "finish_reasons", "metadata"}, lists of one length, and expects
    {"scores": [...]} of that length.

    Args:
        config: Address, time limit, attempts, and the environment variable that holds a bearer token.
        incident_dir: Where the batch is kept when the endpoint fails.

    Raises:
        UserError: If the environment variable is named but not set.
    """

    def __init__(self, config: HTTPRewardConfig, *, incident_dir: Path) -> None:
        self.name = config.name
        self._config = config
        self._incident_dir = incident_dir
        self._client = httpx.Client(timeout=config.timeout_s, headers=_authorization(config))

    def raw_scores(self, batch: TextBatch) -> FloatArray:
        """Post the batch; try again only after time-outs, lost connections and 5xx.

        Args:
            batch: Prompts and responses.

        Returns:
            [B] raw scores, float32.

        Raises:
            RewardError: If all attempts fail, the endpoint refuses (4xx), or its answer is not one finite number for
                each response.
        """
        body = {"keys": [str(key) for key in batch.keys], **batch.arguments()}
        with batch_saved_on_failure(batch, incident_dir=self._incident_dir):
            try:
                answer = self._retrying()(self._post, body)
            except (httpx.HTTPError, ValueError) as error:
                raise RewardError(
                    f"{_place(self._config.url)}: {_describe(error)}", component=self.name, key=batch.keys[0]
                ) from error
            scores = answer.get("scores") if isinstance(answer, dict) else None
            return require_scores(scores, component=self.name, keys=batch.keys)

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._config.attempts),
            wait=tenacity.wait_exponential(multiplier=0.1, max=5.0),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )

    def _post(self, body: Mapping[str, object]) -> object:
        response = self._client.post(self._config.url, json=body)
        response.raise_for_status()
        return response.json()


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


@contextmanager
def batch_saved_on_failure(batch: TextBatch, *, incident_dir: Path) -> Iterator[None]:
    """Save the batch when a reward fails on it, so that the failure can be replayed.

    Args:
        batch: What the reward was asked about.
        incident_dir: Where to.

    Raises:
        RewardError: The one that was raised inside, with the file that holds the batch.
    """
    try:
        yield
    except RewardError as error:
        raise error.saved_at(str(_save(batch, error, incident_dir))) from error.__cause__


def _save(batch: TextBatch, error: RewardError, incident_dir: Path) -> Path:
    # Named by content: the same failure after a retry writes the same file.
    digest = hashlib.sha256(" ".join(map(str, batch.keys)).encode()).hexdigest()[:12]
    path = incident_dir / f"reward-{re.sub(r'[^A-Za-z0-9_.-]', '_', error.component)}-{digest}.json"
    incident_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "kind": "reward_failure",
        "component": error.component,
        "key": str(error.key),
        "what": error.what,
        "keys": [str(key) for key in batch.keys],
        **batch.arguments(),
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _authorization(config: HTTPRewardConfig) -> dict[str, str]:
    if config.token_env is None:
        return {}
    token = os.environ.get(config.token_env)
    if not token:
        raise UserError(
            f"the environment variable {config.token_env} is not set",
            where=f"reward {config.name}",
            next_step=f"export {config.token_env}=... where the scoring workers start",
        )
    return {"Authorization": f"Bearer {token}"}


def _may_pass(error: BaseException) -> bool:
    """Tell whether the same request may succeed a little later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}: {error.response.text[:200]}"
    if isinstance(error, httpx.HTTPError):
        return f"{type(error).__name__}: {error}"
    return f"the answer is not JSON: {error}"


def _place(url: str) -> str:
    """Name an endpoint without what may be secret in its address."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


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
