"""Responses in a file come back bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from cluster import samples
from protocol.errors import UserError
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey, RolloutMeta


def rollout(number: int) -> Rollout:
    prompt = Prompt(
        prompt_id=f"p{number}",
        token_ids=np.array([5, 6, 7], np.int32),
        text="what ?",
        metadata={"kind": "safe"},
        source=[{"role": "user", "content": "what ?"}],
    )
    return Rollout(
        key=RolloutKey(0, -1, prompt.prompt_id, 0),
        prompt=prompt,
        response_ids=np.array([3, 1, 2, 3, 1, 2, 9], np.int32),
        behavior_logprobs=np.array([-0.1, -1.0 / 3.0, -1e-7, -2.5, -3.3, 0.0, -1e-20], np.float32),
        finish_reason="stop",
        policy_versions=PolicyVersions(4, 4),
        worker="rollout-0",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "v004.jsonl"
    written = [rollout(number) for number in range(3)]
    samples.write(path, written)
    found = samples.read(path)
    assert [r.key for r in found] == [r.key for r in written]
    assert all(isinstance(r.key, RolloutKey) and isinstance(r.policy_versions, PolicyVersions) for r in found)
    for ours, theirs in zip(found, written, strict=True):
        assert ours.behavior_logprobs.tobytes() == theirs.behavior_logprobs.tobytes()
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert ours.prompt.token_ids.dtype == np.int32
        assert (ours.prompt.source, ours.prompt.metadata) == (theirs.prompt.source, theirs.prompt.metadata)
        assert RolloutMeta.of(ours) == RolloutMeta.of(theirs)
    assert [path.name for path in path.parent.iterdir()] == ["v004.jsonl"]


def test_repeated_3grams_are_counted() -> None:
    # 3 1 2 | 1 2 3 | 2 3 1 | 3 1 2 (again) | 1 2 9: one of five has come before.
    assert RolloutMeta.of(rollout(0)).repeated_fraction == 1 - 4 / 5


def test_a_damaged_file_is_an_error_with_the_line_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "v004.jsonl"
    samples.write(path, [rollout(number) for number in range(3)])
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for damaged in (
        whole[: second + 40],
        whole[:second] + b"\xff" + whole[second:],
        whole.replace(b"response_ids", b"r"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}, line [12]: the responses .* cannot be read.*`rm {path}`"):
            samples.read(path)
