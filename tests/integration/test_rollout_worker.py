"""The rollout worker as a real Ray actor with a real engine."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from actors.errors import EngineFailedError, StaleWeightsError, WeightMismatchError
from actors.worker import WorkerStatus, environment, remote_class
from configs.rollout import RolloutConfig
from protocol.messages import Prompt, Rollout, RolloutKey, RolloutMeta, RolloutRequest
from protocol.weights import ByteArray, VersionProof
from tests.tiny import tiny_llama, tiny_publication

CONFIG = RolloutConfig(
    max_prompt_tokens=32,
    max_response_tokens=480,
    max_concurrent_sequences=32,
    kv_cache_gib=0.0625,
    threads_per_worker=1,
)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("policy") / "tied", tied=True)


@pytest.fixture(scope="module")
def worker(cluster: None, directory: Path) -> Any:
    return start_worker(directory)


def start_worker(directory: Path) -> Any:
    return (
        remote_class()
        .options(num_cpus=1, runtime_env={"env_vars": environment(CONFIG, "cpu")})
        .remote(name="rollout-0", model_path=str(directory), config=CONFIG, backend="cpu", policy_version=0)
    )


def make_requests(count: int, *, max_response_tokens: int = 16) -> list[RolloutRequest]:
    rng = np.random.default_rng(0)
    requests = []
    for i in range(count):
        key = RolloutKey(round=0, iteration=0, prompt_id=f"p{i:03d}", sample=0)
        prompt = Prompt(prompt_id=key.prompt_id, token_ids=rng.integers(4, 512, size=12).astype(np.int32), text="")
        requests.append(
            RolloutRequest(
                key=key, prompt=prompt, seed=key.seed(11), max_response_tokens=max_response_tokens, temperature=1.0
            )
        )
    return requests


def stream(worker: Any, requests: list[RolloutRequest], *, policy_version: int) -> Any:
    return worker.generate.options(num_returns="streaming").remote(requests, policy_version=policy_version)


def sample(worker: Any, requests: list[RolloutRequest], *, policy_version: int) -> dict[RolloutKey, list[int]]:
    # An error comes in the place of the next item, so all items are fetched.
    items = ray.get(list(stream(worker, requests, policy_version=policy_version)), timeout=TIMEOUT_S)
    return {rollout.key: rollout.response_ids.tolist() for finished in items[::2] for rollout in finished}


def status(worker: Any) -> WorkerStatus:
    return ray.get(worker.status.remote(), timeout=TIMEOUT_S)


def load(worker: Any, publication: tuple[Any, list[ByteArray]]) -> VersionProof:
    manifest, buckets = publication
    return ray.get(worker.load.remote(manifest, [ray.put(bucket) for bucket in buckets]), timeout=TIMEOUT_S)


@torch.no_grad()
def published(directory: Path, *, policy_version: int) -> tuple[Any, list[ByteArray]]:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(policy_version)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return tiny_publication(model, policy_version=policy_version)


def test_responses_stream_step_by_step_with_their_descriptions(worker: Any):
    requests = [replace(r, max_response_tokens=4 + 4 * place) for place, r in enumerate(make_requests(6))]
    items = ray.get(list(stream(worker, requests, policy_version=0)), timeout=TIMEOUT_S)
    for rollouts, metas in zip(items[::2], items[1::2], strict=True):
        assert metas == tuple(RolloutMeta.of(rollout) for rollout in rollouts)
        assert {(rollout.worker, rollout.policy_versions) for rollout in rollouts} == {("rollout-0", (0, 0))}
    keys = [meta.key for metas in items[1::2] for meta in metas]
    assert sorted(keys) == [request.key for request in requests]
    assert len(items) > 2, "all responses came in one step: nothing was streamed"


def test_status_answers_while_responses_are_sampled(worker: Any):
    assert status(worker).state == "idle"
    running = stream(worker, make_requests(32, max_response_tokens=480), policy_version=0)
    first = ray.get(next(running), timeout=TIMEOUT_S)
    seen = status(worker)
    assert all(isinstance(rollout, Rollout) for rollout in first)
    assert (seen.name, seen.state, seen.policy_version) == ("rollout-0", "serving", 0)
    assert seen.node_id == ray.get_runtime_context().get_node_id()
    assert 100e6 < seen.resident_bytes < 4e9
    rest = ray.get(list(running), timeout=TIMEOUT_S)
    assert len(first) + sum(len(step) for step in rest[1::2]) == 32
    assert status(worker).state == "idle"


def test_a_version_that_is_not_held_is_refused(worker: Any):
    with pytest.raises(StaleWeightsError, match="asked for policy version 7 but holds 0"):
        ray.get(next(stream(worker, make_requests(1), policy_version=7)), timeout=TIMEOUT_S)


def test_a_load_is_proved_and_moves_the_version(worker: Any, directory: Path):
    before = sample(worker, make_requests(4), policy_version=0)
    manifest, buckets = published(directory, policy_version=1)
    proof = load(worker, (manifest, buckets))
    assert (proof.worker, proof.policy_version) == ("rollout-0", 1)
    assert (proof.fingerprint, proof.loaded_checksum) == (manifest.fingerprint, manifest.loaded_checksum)
    assert proof.canary_gap_max < 1e-5
    assert proof.seconds < 5
    assert sample(worker, make_requests(4), policy_version=1) != before
    with pytest.raises(StaleWeightsError, match="holds 1"):
        sample(worker, make_requests(1), policy_version=0)


def test_a_worker_that_got_a_corrupted_bucket_is_fenced_until_it_is_refreshed(worker: Any, directory: Path):
    manifest, buckets = published(directory, policy_version=2)
    broken = [bucket.copy() for bucket in buckets]
    broken[-1][0] ^= 128
    with pytest.raises(WeightMismatchError, match="digest"):
        load(worker, (manifest, broken))
    assert status(worker).policy_version is None
    for version in (1, 2):
        with pytest.raises(StaleWeightsError, match="can prove none"):
            sample(worker, make_requests(1), policy_version=version)
    assert load(worker, (manifest, buckets)).policy_version == 2
    assert len(sample(worker, make_requests(2), policy_version=2)) == 2


def test_a_missing_bucket_and_a_wrong_sum_are_mismatches(worker: Any, directory: Path):
    manifest, buckets = published(directory, policy_version=3)
    with pytest.raises(WeightMismatchError, match="buckets were published"):
        load(worker, (manifest, buckets[:-1]))
    with pytest.raises(WeightMismatchError, match="sum to"):
        load(worker, (dataclasses.replace(manifest, loaded_checksum=5), buckets))
    assert status(worker).policy_version is None
    load(worker, (manifest, buckets))


def test_a_dead_engine_says_why_and_the_worker_does_no_more_work(worker: Any, directory: Path):
    def break_engine(worker: Any) -> None:
        # The model is gone, as after a fault in the engine core.
        del worker._engine._engine.model_executor.driver_worker.worker.model_runner.model

    before = status(worker).policy_version
    assert before is not None
    ray.get(worker.__ray_call__.remote(break_engine), timeout=TIMEOUT_S)
    with pytest.raises(EngineFailedError) as failed:
        sample(worker, make_requests(2), policy_version=before)
    [cause] = [error for error in (getattr(failed.value, "cause", None),) if isinstance(error, EngineFailedError)]
    assert str(cause).startswith("the engine of rollout-0 failed: vLLM failed in a step: AttributeError")
    assert "Traceback (most recent call last)" in str(cause)
    assert status(worker).policy_version is None
    with pytest.raises(EngineFailedError, match="has no engine any more: vLLM failed in a step"):
        sample(worker, make_requests(2), policy_version=before)
    with pytest.raises(EngineFailedError, match="has no engine any more: vLLM failed in a step"):
        load(worker, published(directory, policy_version=9))
