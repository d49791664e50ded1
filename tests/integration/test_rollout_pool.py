"""The rollout pool over real workers: fenced, refreshed, replaced, and no response lost or doubled."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from actors import worker as rollout_worker
from cluster.pool import Anywhere
from cluster.rollout_pool import RolloutPool
from configs.cluster import DeadlinesConfig
from configs.rollout import RolloutConfig
from protocol.errors import WorkersLostError
from protocol.incidents import Incident
from protocol.messages import Prompt, RolloutKey, RolloutRequest
from protocol.roles import Publication
from tests.tiny import tiny_llama, tiny_publication

CONFIG = RolloutConfig(workers=2, max_prompt_tokens=32, max_response_tokens=96, max_concurrent_sequences=16)


def make_requests(count: int) -> list[RolloutRequest]:
    prompt = Prompt(prompt_id="p", token_ids=np.array([5, 6, 7], dtype=np.int32), text="p")
    keys = [RolloutKey(1, 0, "p", sample) for sample in range(count)]
    return [
        RolloutRequest(
            key=key, prompt=prompt, seed=key.seed(0), max_response_tokens=8 + 8 * (key.sample % 11), temperature=1.0
        )
        for key in keys
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_llama(directory)
    return directory


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def publication(model: Path, version: int) -> Publication:
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    manifest, buckets = tiny_publication(network, policy_version=version)
    return Publication(manifest=manifest, buckets=tuple(ray.put(bucket) for bucket in buckets))


@pytest.fixture
def incidents() -> list[Incident]:
    return []


@pytest.fixture
def make(model: Path) -> Callable[[int, str], Any]:
    environment = {"env_vars": rollout_worker.environment(CONFIG, "cpu")}

    def make(index: int, name: str) -> Any:
        remote = rollout_worker.remote_class().options(num_cpus=0.5, runtime_env=environment)
        return remote.remote(name=name, model_path=str(model), config=CONFIG, backend="cpu", policy_version=0)

    return make


@pytest.fixture
def pool(cluster: None, make: Callable[[int, str], Any], incidents: list[Incident]) -> Iterator[RolloutPool]:
    deadlines = DeadlinesConfig(floor_s=3.0)  # it bounds nothing before three batches have been measured
    made = RolloutPool(CONFIG, deadlines, make=make, replacements=1, report=incidents.append)
    made.started()
    yield made
    made.stop()


def test_a_worker_lost_while_serving_is_replaced_and_nothing_is_lost_or_doubled(
    pool: RolloutPool, model: Path, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    pool.load(publication(model, 1))
    requests = make_requests(40)
    expected = {
        f.meta.key: ray.get(f.payload.step)[f.payload.place].response_ids.tolist()
        for f in pool.generate(requests, policy_version=1)
    }
    assert len(expected) == 40

    seen = {}
    with caplog.at_level(logging.WARNING):
        for finished in pool.generate(requests, policy_version=1):
            if not seen:
                ray.kill(pool.members[1].handle, no_restart=True)
            assert finished.meta.key not in seen
            seen[finished.meta.key] = ray.get(finished.payload.step)[finished.payload.place].response_ids.tolist()
    assert seen == expected
    assert "rollout-1 is lost" in caplog.text

    ray.kill(pool.members[0].handle, no_restart=True)
    with pytest.raises(WorkersLostError, match=r"cluster\.worker_replacements is used up"):
        list(pool.generate(requests, policy_version=1))


class NoRoom(Anywhere):
    """Places of which the second is never granted again."""

    def granted(self, index: int) -> bool:
        return index == 0


def test_what_a_worker_without_a_place_owes_is_dealt_to_the_others(
    cluster: None, make: Callable[[int, str], Any], incidents: list[Incident]
) -> None:
    pool = RolloutPool(
        CONFIG,
        DeadlinesConfig(placement_s=0.5, silence_s=60),
        make=make,
        replacements=1,
        report=incidents.append,
        places=NoRoom(range(2)),
    )
    try:
        ray.get([member.handle.status.remote() for member in pool.members], timeout=120)
        requests = make_requests(40)
        expected = {f.meta.key for f in pool.generate(requests, policy_version=0)}
        seen: list[RolloutKey] = []
        for finished in pool.generate(requests, policy_version=0):
            if not seen:
                ray.kill(pool.members[1].handle, no_restart=True)
            seen.append(finished.meta.key)
        assert sorted(seen) == sorted(expected)
        assert [member.name for member in pool.members] == ["rollout-0"]
        assert [incident.kind for incident in incidents] == ["worker_lost", "worker_unplaced"]
        assert len(list(pool.generate(requests, policy_version=0))) == 40
        ray.kill(pool.members[0].handle, no_restart=True)
        with pytest.raises(WorkersLostError, match=r"cluster\.worker_replacements is used up"):
            list(pool.generate(requests, policy_version=0))
    finally:
        pool.stop()


def test_a_worker_without_proof_is_fenced_refreshed_and_readmitted(
    pool: RolloutPool, model: Path, incidents: list[Incident], caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once(worker: Any) -> None:
        # The next load leaves one weight as it was, as a lost message would.
        engine = worker._engine
        real = engine.load

        def load(manifest: Any, fetch: Any) -> None:
            real(manifest, fetch)
            engine.load = real
            runner = engine._engine.model_executor.driver_worker.worker.model_runner
            next(iter(runner.model.parameters())).data.view(-1)[0] += 1.0

        engine.load = load

    ray.get(pool.members[0].handle.__ray_call__.remote(fail_once))
    with caplog.at_level(logging.WARNING):
        proofs = pool.load(publication(model, 1))
    assert "rollout-0 is fenced, it could not prove version 1" in caplog.text
    assert [(incident.kind, incident.where) for incident in incidents] == [("worker_fenced", "rollout-0")]
    assert [proof.worker for proof in proofs] == ["rollout-0", "rollout-1"]
    assert all(proof.canary_gap_max < 1e-4 for proof in proofs)
    assert len(list(pool.generate(make_requests(6), policy_version=1))) == 6


@pytest.mark.slow
def test_an_engine_that_hangs_costs_a_measured_deadline_and_not_the_configured_one(
    pool: RolloutPool, model: Path, incidents: list[Incident]
) -> None:
    def hang(worker: Any) -> None:
        worker._engine._step = lambda: time.sleep(1000)

    pool.load(publication(model, 1))
    requests = make_requests(4)
    expected, *_ = [{f.meta.key for f in pool.generate(requests, policy_version=1)} for _ in range(3)]
    ray.get(pool.members[1].handle.__ray_call__.remote(hang))
    began = time.monotonic()
    assert {f.meta.key for f in pool.generate(requests, policy_version=1)} == expected
    assert time.monotonic() - began < 100  # silence_s is 120 s, generate_s 1800 s
    [incident] = incidents
    assert (incident.kind, incident.where) == ("worker_late", "rollout-1")
    assert "rollout-1 owes 2 responses, the first r1/i0/p#1, after cluster.deadlines." in incident.cause
    assert "the longest of the last 3 took " in incident.cause
    assert "cluster.deadlines.generate_s = 1800 s" in incident.cause
    assert "hang" in incident.data["stacks"] or "lambda" in incident.data["stacks"]
