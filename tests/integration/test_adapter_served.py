"""A real vLLM engine that holds the base and is sent the adapter alone: what it computes with, and what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from configs.models import LoraConfig, TrainedPartConfig
from configs.rollout import RolloutConfig
from learner import adapters, export, weight_sender
from protocol.messages import Rollout
from protocol.weights import WeightManifest
from tests.integration.test_adapter_engine import gap_to_adapter
from tests.integration.test_rollout_engine import (
    CONFIG,
    ENGINES,
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

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# vLLM knows no rank 5: it is filled up to 8.
LORA = LoraConfig(rank=5, alpha=15.0, target_modules=LAYERS)


def in_child_open(directory: str, config: RolloutConfig, adapter: LoraConfig) -> None:
    from actors.engine import VLLMEngine  # in the child only

    ENGINES[directory] = VLLMEngine(directory, config, adapter=adapter)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policies") / "v000", hidden=128)


@pytest.fixture(scope="module")
def child(base: Path) -> Iterator[Child]:
    child = Child()
    child.call(in_child_open, str(base), CONFIG, LORA)
    yield child
    child.close()


def policy(base: Path, lora: LoraConfig = LORA, *, seed: int) -> PlainEngine:
    """An adapter of random A and B, neither of them zero."""
    found = adapters.open_policy(base, TrainedPartConfig(lora=lora), precision="fp32", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return PlainEngine(found, optimizer=OptimizerConfig(), settings=LearnerConfig())


def published(engine: PlainEngine, *, version: int = 3) -> tuple[WeightManifest, list[Any]]:
    alone = adapters.Alone(engine)
    *buckets, manifest = weight_sender.publish(alone, policy_version=version, bucket_bytes=20_000, dtype="float32")
    assert isinstance(manifest, WeightManifest)
    return manifest, buckets


def sampled(child: Child, base: Path) -> list[Rollout]:
    return child.call(in_child_generate, str(base), CONFIG, make_requests(16))


def test_learner_merged_export_and_engine_with_the_adapter_agree(child: Child, base: Path, tmp_path: Path) -> None:
    before = sampled(child, base)
    assert gap_to(load_model(base), before) < 1e-5, "until something is published it is the base"
    for seed in (1, 2):
        engine = policy(base, seed=seed)
        manifest, buckets = published(engine)
        assert len(buckets) > 2
        checksum, canary = child.call(in_child_load, str(base), CONFIG, manifest, buckets)
        assert checksum == manifest.loaded_checksum
        assert canary == pytest.approx(manifest.canary.logprobs, abs=1e-4)
        rollouts = sampled(child, base)
        assert by_key(rollouts) != by_key(before)
        assert gap_to_adapter(engine, rollouts) < 1e-4
        exported = tmp_path / "policies" / f"v{seed:03d}"
        export.export_policy(engine, tiny_tokenizer(), exported, card={})
        assert gap_to(load_model(exported), rollouts) < 1e-4
        assert gap_to(load_model(base), rollouts) > 1e-2
