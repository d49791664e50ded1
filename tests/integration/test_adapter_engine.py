"""A real vLLM engine computes what the learner's adapter computes: from published weights, and from the export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from configs.models import LoraConfig, TrainedPartConfig
from learner import adapters, export, weight_sender
from protocol.messages import Rollout
from protocol.weights import WeightManifest
from tests.integration.test_rollout_engine import (
    CONFIG,
    Child,
    by_key,
    gap_to,
    in_child_generate,
    in_child_load,
    load_model,
    make_requests,
)
from tests.plain_engine import PlainEngine
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def trained(base: Path) -> PlainEngine:
    train = TrainedPartConfig(lora=LoraConfig(rank=4))
    policy = adapters.open_policy(base, train, precision="fp32", seed=1)
    engine = PlainEngine(policy, optimizer=OptimizerConfig(learning_rate=1e-2), settings=LearnerConfig())
    ids, positions = torch.arange(5, 69)[None], torch.arange(64)
    for _ in range(3):
        logprobs, _ = engine.forward(ids, positions[None], positions[:-1], ids[0, 1:])
        engine.backward(-logprobs.sum(), last=True)
        engine.step()
    return engine


@torch.no_grad()
def gap_to_adapter(engine: PlainEngine, rollouts: list[Rollout]) -> float:
    gaps = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.token_ids.tolist(), *rollout.response_ids.tolist()]])
        places = torch.arange(len(rollout.prompt.token_ids) - 1, ids.shape[1] - 1)
        found, _ = engine.evaluate(ids, torch.arange(ids.shape[1])[None], places, ids[0, places + 1])
        gaps.append(float((found - torch.from_numpy(rollout.behavior_logprobs.copy())).abs().max()))
    return max(gaps)


def test_adapter_merged_export_and_engine_agree(child: Child, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "policies" / "v000")
    engine = trained(base)
    *buckets, manifest = weight_sender.publish(engine, policy_version=3, bucket_bytes=60_000, dtype="float32")
    assert isinstance(manifest, WeightManifest)
    assert len(buckets) > 2
    exported = base.parent / "v003"
    export.export_policy(engine, tiny_tokenizer(), exported, card={})

    before = child.call(in_child_generate, str(base), CONFIG, make_requests(16))
    assert gap_to_adapter(engine, before) > 1e-2
    checksum, canary = child.call(in_child_load, str(base), CONFIG, manifest, buckets)
    assert checksum == manifest.loaded_checksum
    assert canary == pytest.approx(manifest.canary.logprobs, abs=1e-4)
    published = child.call(in_child_generate, str(base), CONFIG, make_requests(16))
    assert gap_to_adapter(engine, published) < 1e-4
    assert gap_to(load_model(exported), published) < 1e-4
    # The export, with its adapter/ beside the weights, loads without conversion and holds the same bits.
    opened = child.call(in_child_generate, str(exported), CONFIG, make_requests(16))
    assert by_key(opened) == by_key(published) != by_key(before)
