"""A batch as a table, for people and for post-mortems: one row a response, text beside the numbers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from protocol.files import staged
from protocol.messages import IntArray, RolloutKey, SampleText, ScoredBatch, ScoredRollout

Decode = Callable[[IntArray], str]


def write_batch(path: Path, batch: ScoredBatch, *, decode: Decode, kl_nats: Mapping[RolloutKey, float]) -> None:
    """Write a batch as Parquet, whole or not at all.

    Args:
        path: The file; replaced if it exists.
        batch: The scored batch.
        decode: Turns token ids into text.
        kl_nats: The k1 estimate of each response; what is missing is left empty.
    """
    rows = [_row(scored, decode=decode, kl_nats=kl_nats.get(scored.rollout.key)) for scored in batch.rollouts]
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        parquet.write_table(pyarrow.Table.from_pylist(rows), staging)


def samples(
    batch: ScoredBatch,
    keys: Sequence[RolloutKey],
    *,
    decode: Decode,
    kl_nats: Mapping[RolloutKey, float],
    kl_beta: float,
) -> tuple[SampleText, ...]:
    """Decode a few responses.

    Args:
        batch: The batch that they are in.
        keys: Which.
        decode: Turns token ids into text.
        kl_nats: The k1 estimate of each response.
        kl_beta: The KL coefficient that the batch was learned with.

    Returns:
        The responses, in the order of `keys`.
    """
    by_key = {scored.rollout.key: scored for scored in batch.rollouts}
    found = [(by_key[key], kl_nats[key]) for key in keys]
    return tuple(
        SampleText(
            key=scored.rollout.key,
            prompt=scored.rollout.prompt.text,
            response=decode(scored.rollout.response_ids),
            score=scored.score,
            kl_nats=nats,
            reward=scored.score - kl_beta * nats,
        )
        for scored, nats in found
    )


def _row(scored: ScoredRollout, *, decode: Decode, kl_nats: float | None) -> dict[str, Any]:
    rollout = scored.rollout
    return {
        **rollout.key._asdict(),
        "prompt": rollout.prompt.text,
        "response": decode(rollout.response_ids),
        "score": scored.score,
        **{f"component/{name}": value for name, value in scored.components.items()},
        "kl_k1_nats": kl_nats,
        "finish_reason": rollout.finish_reason,
        "policy_version_first": rollout.policy_versions.first,
        "policy_version_last": rollout.policy_versions.last,
        "worker": rollout.worker,
        "prompt_ids": rollout.prompt.token_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "behavior_logprobs": rollout.behavior_logprobs.tolist(),
        "ref_logprobs": scored.ref_logprobs.tolist(),
    }
