"""A rank with the real engines (DeepSpeed, without Ray) that trains adapters: what it keeps and goes on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from learner.rank import Rank
from protocol.errors import UserError
from protocol.messages import UpdateReport
from protocol.weights import WeightManifest
from tests.integration.test_rank_algorithms import UNGUARDED, groups
from tests.learner_batches import single_rank
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_config

ADAPTERS = (
    "models.policy.train.lora={rank: 4, alpha: 8, target_modules: [q_proj, v_proj, down_proj]}",
    "models.critic.train.lora.rank=2",
    "models.critic.init=policy",
    "learner.policy_optimizer.learning_rate=1e-2",
    UNGUARDED,
)


def started(directory: Path, policy: Path, *overrides: str) -> Rank:
    rank = Rank(single_rank(), config=tiny_config(directory, *ADAPTERS, *overrides), run_directory=directory / "run")
    rank.start_rl(policy=policy, reward_model=None, iterations=3)
    rank.policy_version = 3  # the version that the batch says it was sampled by
    return rank


def update(rank: Rank, iteration: int) -> UpdateReport:
    return rank.update(groups(), round=1, iteration=iteration)


def manifest_of(stream: Any) -> WeightManifest:
    *_, manifest = stream
    assert isinstance(manifest, WeightManifest)
    return manifest


@pytest.mark.parametrize(("stage", "publish"), [(0, "merged"), (3, "merged"), (0, "adapter"), (3, "adapter")])
def test_a_rank_learns_publishes_keeps_and_goes_on(stage: int, publish: str, tmp_path: Path) -> None:
    overrides = (f"learner.zero_stage={stage}", f"rollout.publish={publish}")
    base = tiny_llama(tmp_path / "policies" / "v000", hidden=128)
    rank = started(tmp_path, base, *overrides)
    first_version = manifest_of(rank.publish(0))
    assert first_version == manifest_of(rank.publish_stored(0, base)), "the adapter begins as nothing"
    rank.policy_version = 3  # the version that the batch says it was sampled by
    first = update(rank, 0).metrics
    assert first["policy/grad_norm"] > 0
    assert first["policy/first_minibatch_ratio_gap_max"] < 1e-5
    kept = tmp_path / "checkpoint"
    kept.mkdir()
    rank.save(kept)
    published = manifest_of(rank.publish(3))
    assert rank.announce(3) == published
    exported = base.parent / "v003"
    rank.export(exported, card={})
    second = update(rank, 1)
    rank.finish_rl()

    # What rollout workers are told of the export is what they were told by the learner that wrote it.
    stored = manifest_of(rank.publish_stored(3, exported))
    assert (stored.loaded_checksum, stored.bucket_digests) == (published.loaded_checksum, published.bucket_digests)
    assert stored.canary.logprobs == pytest.approx(published.canary.logprobs, abs=1e-4)

    resumed = started(tmp_path, base, *overrides)
    resumed.load(kept)
    assert manifest_of(resumed.publish(3)) == published
    assert update(resumed, 1) == second
    resumed.finish_rl()

    # The next round: the same base, the same adapter, and so the same published bits.
    following = started(tmp_path, exported, *overrides)
    assert manifest_of(following.publish(3)) == published
    following.finish_rl()

    weights, untouched = load_file(exported / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], untouched[name])}
    assert changed == {name for name in weights if name.split(".")[-2] in ("q_proj", "v_proj", "down_proj")}
    assert set(weights) == set(untouched)


def test_another_adapter_than_the_policy_s_is_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "policies" / "v000")
    rank = started(tmp_path, base)
    rank.export(base.parent / "v003", card={})
    rank.finish_rl()
    with pytest.raises(UserError, match="rank 4, alpha 8 and adapts down_proj, q_proj, v_proj"):
        started(tmp_path, base.parent / "v003", "models.policy.train.lora.rank=8")
