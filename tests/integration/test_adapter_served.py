"""Real rollout workers that hold the base and are sent the adapter alone: what they sample with, what they refuse."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors import worker as rollout_worker
from actors.errors import StaleWeightsError, WeightMismatchError
from cluster.rollout_pool import RolloutPool
from configs.cluster import DeadlinesConfig
from configs.learner import LearnerConfig, OptimizerConfig
from configs.models import LoraConfig, TrainedPartConfig
from learner import adapters, export, weight_sender
from protocol.messages import Rollout
from protocol.roles import Publication
from protocol.weights import ByteArray, VersionProof, WeightManifest, digest
from tests.integration.test_adapter_engine import gap_to_adapter
from tests.integration.test_rollout_engine import CONFIG, by_key, gap_to, load_model, make_requests
from tests.plain_engine import PlainEngine
from tests.tiny import tiny_llama, tiny_tokenizer

# vLLM knows no rank 5: it is filled up to 8.
LORA = LoraConfig(rank=5, alpha=15.0, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
TIMEOUT_S = 120


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policies") / "v000", hidden=128)


@pytest.fixture(scope="module")
def pool(base: Path) -> Iterator[RolloutPool]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    environment = {"env_vars": rollout_worker.environment(CONFIG, "cpu")}

    def make(index: int, name: str) -> Any:
        remote = rollout_worker.remote_class().options(num_cpus=0.5, runtime_env=environment)
        place = {"name": name, "model_path": str(base), "config": CONFIG, "backend": "cpu"}
        return remote.remote(**place, policy_version=0, adapter=LORA)

    made = RolloutPool(CONFIG, DeadlinesConfig(), make=make, replacements=1, report=lambda incident: None)
    made.started()
    yield made
    ray.shutdown()


def policy(base: Path, *, seed: int, spread: float = 0.05) -> PlainEngine:
    """Put an adapter on the base, with random A and B."""
    found = adapters.open_policy(base, TrainedPartConfig(lora=LORA), precision="fp32", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return PlainEngine(found, optimizer=OptimizerConfig(), settings=LearnerConfig())


def published(engine: PlainEngine, *, version: int) -> tuple[WeightManifest, list[ByteArray]]:
    alone = adapters.Alone(engine)
    *buckets, manifest = weight_sender.publish(alone, policy_version=version, bucket_bytes=20_000, dtype="float32")
    assert isinstance(manifest, WeightManifest)
    return manifest, [np.asarray(bucket) for bucket in buckets]


def publication(manifest: WeightManifest, buckets: Sequence[ByteArray]) -> Publication:
    return Publication(manifest=manifest, buckets=tuple(ray.put(bucket) for bucket in buckets))


def sampled(pool: RolloutPool, version: int) -> list[Rollout]:
    return pool.fetch(list(pool.generate(make_requests(16), policy_version=version)))


def load(pool: RolloutPool, manifest: WeightManifest, buckets: Sequence[ByteArray]) -> VersionProof:
    """Load without the pool, which would try twice and replace the worker."""
    refs = [ray.put(bucket) for bucket in buckets]
    return ray.get(pool.members[0].handle.load.remote(manifest, refs), timeout=TIMEOUT_S)


def test_learner_merged_export_and_engine_with_the_adapter_agree(pool: RolloutPool, base: Path, tmp_path: Path) -> None:
    before = sampled(pool, 0)
    assert gap_to(load_model(base), before) < 1e-5, "until something is published it is the base"
    for version in (1, 2):
        engine = policy(base, seed=version)
        manifest, buckets = published(engine, version=version)
        assert len(buckets) > 2
        [proof] = pool.load(publication(manifest, buckets))
        assert proof.canary_gap_max < 1e-4
        rollouts = sampled(pool, version)
        assert gap_to_adapter(engine, rollouts) < 1e-4
        exported = tmp_path / "policies" / f"v{version:03d}"
        export.export_policy(engine, tiny_tokenizer(), exported, card={})
        assert gap_to(load_model(exported), rollouts) < 1e-4
        assert gap_to(load_model(base), rollouts) > 1e-1
        *_, whole = weight_sender.publish(engine, policy_version=version, bucket_bytes=10**6, dtype="float32")
        assert isinstance(whole, WeightManifest)
        assert manifest.num_bytes < whole.num_bytes / 10
    # A version without an adapter, such as the first one, is sent as one that adds nothing.
    pool.load(publication(*published(policy(base, seed=3, spread=0.0), version=0)))
    assert by_key(sampled(pool, 0)) == by_key(before)


Change = tuple[WeightManifest, list[ByteArray]]


def with_a_flipped_bit(manifest: WeightManifest, buckets: list[ByteArray]) -> Change:
    broken = [bucket.copy() for bucket in buckets]
    broken[1][7] ^= 1
    return manifest, broken


def with_another_tensor(manifest: WeightManifest, buckets: list[ByteArray]) -> Change:
    """It was damaged before the bucket was hashed, after the policy was summed."""
    _, broken = with_a_flipped_bit(manifest, buckets)
    return dataclasses.replace(manifest, bucket_digests=tuple(digest(b) for b in broken)), broken


def without_a_layer(manifest: WeightManifest, buckets: list[ByteArray]) -> Change:
    kept = tuple(slot for slot in manifest.slots if ".layers.1.mlp.up_proj." not in slot.spec.name)
    assert len(kept) == len(manifest.slots) - 2
    return dataclasses.replace(manifest, slots=kept), buckets


def without_a_half(manifest: WeightManifest, buckets: list[ByteArray]) -> Change:
    return dataclasses.replace(manifest, slots=manifest.slots[:-1]), buckets


def of_a_layer_that_is_not_served(manifest: WeightManifest, buckets: list[ByteArray]) -> Change:
    slots = [
        dataclasses.replace(s, spec=dataclasses.replace(s.spec, name=s.spec.name.replace("up_proj", "side_proj")))
        for s in manifest.slots
    ]
    return dataclasses.replace(manifest, slots=tuple(slots)), buckets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_a_flipped_bit, "the manifest says"),
        (with_another_tensor, "parameters sum to"),
        (without_a_layer, "parameters sum to"),
        (without_a_half, "are not the A and B of"),
        (of_a_layer_that_is_not_served, r"vLLM adapts no layer model\.layers\.0\.mlp\.side_proj, "),
    ],
)
def test_an_adapter_that_is_not_the_published_one_is_found(
    pool: RolloutPool, base: Path, change: Any, message: str
) -> None:
    good = published(policy(base, seed=5), version=5)
    assert load(pool, *good).policy_version == 5
    following = published(policy(base, seed=6), version=6)
    with pytest.raises(WeightMismatchError, match=message):
        load(pool, *change(*following))
    for version in (5, 6):
        with pytest.raises(StaleWeightsError, match="can prove none"):
            sampled(pool, version)
    assert load(pool, *following).canary_gap_max < 1e-4


def test_an_adapter_of_an_older_version_is_found(pool: RolloutPool, base: Path) -> None:
    (_, stale), (manifest, fresh) = (published(policy(base, seed=seed), version=7) for seed in (6, 7))
    mixed = [*fresh[:-1], stale[-1]]
    with pytest.raises(WeightMismatchError, match="the manifest says"):
        load(pool, manifest, mixed)
    rehashed = dataclasses.replace(manifest, bucket_digests=tuple(digest(bucket) for bucket in mixed))
    with pytest.raises(WeightMismatchError, match="parameters sum to"):
        load(pool, rehashed, mixed)


def test_an_adapter_on_another_base_is_found(pool: RolloutPool, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "v000", hidden=128, seed=1)
    with pytest.raises(WeightMismatchError, match="parameters sum to"):
        load(pool, *published(policy(other, seed=1), version=1))


def test_a_replacement_gets_base_and_current_adapter(pool: RolloutPool, base: Path) -> None:
    engine = policy(base, seed=8)
    pool.load(publication(*published(engine, version=8)))
    expected = by_key(sampled(pool, 8))
    lost = pool.members[0]
    ray.kill(lost.handle, no_restart=True)
    rollouts = sampled(pool, 8)
    assert pool.members[0].name != lost.name or pool.members[0].handle is not lost.handle
    assert by_key(rollouts) == expected
    assert gap_to_adapter(engine, rollouts) < 1e-4
