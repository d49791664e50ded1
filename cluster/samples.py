"""Responses in a file, one JSON object each, so that they can be scored again when the reward model has changed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protocol.errors import UserError
from protocol.files import write_text
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write responses whole or not at all.

    Args:
        path: The file.
        rollouts: In any order, which is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(_to_json(rollout)) + "\n" for rollout in rollouts))


def read(path: Path) -> list[Rollout]:
    """Read what `write` wrote, bit for bit.

    Raises:
        UserError: If the file is damaged, with the line.
    """
    found: list[Rollout] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                found.append(_from_json(json.loads(line)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the responses that are kept here cannot be read",
            where=f"{path}, line {len(found) + 1}",
            cause=f"the file is cut off or damaged ({type(error).__name__}: {error})",
            next_step=f"restore it from a copy; or `rm {path}` and give the same command again: they are sampled anew, "
            "from the same policy with the same seeds",
        ) from error
    return found


def _to_json(rollout: Rollout) -> dict[str, Any]:
    prompt = rollout.prompt
    return {
        "key": list(rollout.key),
        "prompt": {
            "prompt_id": prompt.prompt_id,
            "token_ids": prompt.token_ids.tolist(),
            "text": prompt.text,
            "metadata": dict(prompt.metadata),
            "source": prompt.source,
        },
        "response_ids": rollout.response_ids.tolist(),
        # A float32 as Python's float and back is the same float32.
        "behavior_logprobs": None if rollout.behavior_logprobs is None else rollout.behavior_logprobs.tolist(),
        "finish_reason": rollout.finish_reason,
        "policy_versions": list(rollout.policy_versions),
        "worker": rollout.worker,
    }


def _from_json(values: dict[str, Any]) -> Rollout:
    prompt, recorded = values["prompt"], values["behavior_logprobs"]
    return Rollout(
        key=RolloutKey(*values["key"]),
        prompt=Prompt(**{**prompt, "token_ids": np.array(prompt["token_ids"], np.int32)}),
        response_ids=np.array(values["response_ids"], np.int32),
        behavior_logprobs=None if recorded is None else np.array(recorded, np.float32),
        finish_reason=values["finish_reason"],
        policy_versions=PolicyVersions(*values["policy_versions"]),
        worker=values["worker"],
    )
