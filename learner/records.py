"""A batch as a table, for people, for post-mortems and for replay: one row a response, text beside the numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from protocol.files import staged
from protocol.messages import (
    IntArray,
    PolicyVersions,
    Prompt,
    Rollout,
    RolloutKey,
    SampleText,
    ScoredBatch,
    ScoredRollout,
)

Decode = Callable[[IntArray], str]


_SETTINGS = b"rondo"
_COMPONENT = "component/"
_COMPUTED = "computed/"


class Replay(NamedTuple):
    """A batch that was kept, and what learning from it depends on besides the networks."""

    batch: ScoredBatch
    settings: dict[str, float]
    """`run_seed` (with the batch's round and iteration it seeds the shuffles) and `kl_beta`."""
    computed: dict[str, list[list[float]]]
    """What had been computed from it: name -> one vector a response, such as `old_logprobs` and `advantages`."""


def write_batch(
    path: Path,
    batch: ScoredBatch,
    *,
    decode: Decode,
    kl_nats: Mapping[RolloutKey, float],
    computed: Mapping[str, Sequence[Sequence[float]]] | None = None,
    settings: Mapping[str, float] | None = None,
) -> None:
    """Write a batch as Parquet, whole or not at all.

    Args:
        path: The file; replaced if it exists.
        batch: The scored batch.
        decode: Turns token ids into text.
        kl_nats: The k1 estimate of each response; what is missing is left empty.
        computed: What was computed from the batch: name -> one vector a response.
        settings: What else learning from it depends on.
    """
    rows = [_row(scored, decode=decode, kl_nats=kl_nats.get(scored.rollout.key)) for scored in batch.rollouts]
    for name, parts in (computed or {}).items():
        for row, part in zip(rows, parts, strict=True):
            row[_COMPUTED + name] = list(part)
    place = {"round": batch.round, "iteration": batch.iteration, "policy_version": batch.policy_version}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
        {_SETTINGS: json.dumps({"batch": place, "settings": dict(settings or {})})}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as staging:
        parquet.write_table(table, staging)


def read_batch(path: Path) -> Replay:
    """Read a batch that `write_batch` wrote, so that it can be learned from once more.

    Everything that an update reads is there, bit for bit; a prompt's further columns, which only rewards read, are not.

    Args:
        path: The file.

    Returns:
        The batch, and what goes with it.
    """
    table = parquet.read_table(path)
    about = json.loads(table.schema.metadata[_SETTINGS])
    rows = table.to_pylist()
    names = [name.removeprefix(_COMPUTED) for name in table.column_names if name.startswith(_COMPUTED)]
    return Replay(
        batch=ScoredBatch(rollouts=tuple(_scored(row) for row in rows), **about["batch"]),
        settings=about["settings"],
        computed={name: [row[_COMPUTED + name] for row in rows] for name in names},
    )


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
        **{_COMPONENT + name: value for name, value in scored.components.items()},
        "kl_k1_nats": kl_nats,
        "finish_reason": rollout.finish_reason,
        "policy_version_first": rollout.policy_versions.first,
        "policy_version_last": rollout.policy_versions.last,
        "worker": rollout.worker,
        "prompt_ids": rollout.prompt.token_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "behavior_logprobs": None if rollout.behavior_logprobs is None else rollout.behavior_logprobs.tolist(),
        "ref_logprobs": scored.ref_logprobs.tolist(),
    }


def _scored(row: Mapping[str, Any]) -> ScoredRollout:
    recorded = row["behavior_logprobs"]
    rollout = Rollout(
        key=RolloutKey(**{name: row[name] for name in RolloutKey._fields}),
        prompt=Prompt(
            prompt_id=row["prompt_id"], token_ids=np.array(row["prompt_ids"], dtype=np.int32), text=row["prompt"]
        ),
        response_ids=np.array(row["response_ids"], dtype=np.int32),
        behavior_logprobs=None if recorded is None else np.array(recorded, dtype=np.float32),
        finish_reason=row["finish_reason"],
        policy_versions=PolicyVersions(row["policy_version_first"], row["policy_version_last"]),
        worker=row["worker"],
    )
    return ScoredRollout(
        rollout=rollout,
        score=row["score"],
        components={
            name.removeprefix(_COMPONENT): value
            for name, value in row.items()
            if name.startswith(_COMPONENT) and value is not None
        },
        ref_logprobs=np.array(row["ref_logprobs"], dtype=np.float32),
    )
