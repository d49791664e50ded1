"""A publish by broadcast over real learner ranks and real engines: proved like any other, and no member can hang it."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors import worker as rollout_worker
from cluster.learner_group import LearnerGroup
from cluster.rollout_pool import RolloutPool
from configs.load import load
from configs.run import RunConfig
from learner import worker as learner_worker
from protocol.messages import Prompt, RolloutKey, RolloutRequest
from protocol.weights import VersionProof
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_overrides

PUBLISH_S = 120
OVERRIDES = (
    "rollout.weight_transfer=collective",
    "rollout.workers=2",
    "rollout.max_response_tokens=64",
    "learner.workers=2",
    "learner.zero_stage=3",
    "learner.bucket_mib=0.1",
    "models.critic.init=policy",
    f"cluster.deadlines.publish_s={PUBLISH_S}",
)

pytestmark = pytest.mark.slow  # two engines and two ranks, killed and replaced


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("collective")
    tiny_llama(root / "policy")
    tiny_llama(root / "stale", seed=1)  # what the engines start from: a load that does nothing shows
    return root


@pytest.fixture(scope="module")
def config(directory: Path) -> RunConfig:
    return load("quickstart", tiny_overrides(directory, *OVERRIDES))


@pytest.fixture(scope="module")
def ranks(cluster: None, config: RunConfig, directory: Path) -> list[Any]:
    make = learner_worker.remote_class().options(
        num_cpus=0.5, runtime_env={"env_vars": learner_worker.environment(config)}
    )
    return [make.remote(rank=rank, world_size=2, config=config, run_directory=directory) for rank in range(2)]


@pytest.fixture(scope="module")
def learner(ranks: list[Any], config: RunConfig, directory: Path) -> Iterator[LearnerGroup]:
    group = LearnerGroup(config, make=lambda rank, name: ranks[rank])
    group.started()
    group.start_rl(policy=directory / "policy", reward_model=None, iterations=config.rounds.iterations)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def pool(learner: LearnerGroup, config: RunConfig, directory: Path) -> Iterator[RolloutPool]:
    environment = {"env_vars": rollout_worker.environment(config.rollout, "cpu")}
    model = str(directory / "stale")

    def make(index: int, name: str) -> Any:
        remote = rollout_worker.remote_class().options(num_cpus=0.5, runtime_env=environment)
        return remote.remote(name=name, model_path=model, config=config.rollout, backend="cpu", policy_version=0)

    made = RolloutPool(
        config.rollout, config.cluster.deadlines, make=make, replacements=9, report=lambda incident: None
    )
    made.started()
    yield made
    made.stop()


def sample(pool: RolloutPool, version: int) -> dict[RolloutKey, list[int]]:
    return {f.meta.key: tokens(f) for f in pool.generate(make_requests(), policy_version=version)}


def make_requests() -> list[RolloutRequest]:
    prompt = Prompt(prompt_id="p", token_ids=np.array([5, 6, 7], dtype=np.int32), text="p")
    keys = [RolloutKey(1, 0, "p", number) for number in range(8)]
    return [
        RolloutRequest(key=key, prompt=prompt, seed=key.seed(0), max_response_tokens=48, temperature=1.0)
        for key in keys
    ]


def tokens(finished: Any) -> list[int]:
    return ray.get(finished.payload.step)[finished.payload.place].response_ids.tolist()


def content(proofs: tuple[VersionProof, ...]) -> list[tuple[int, str, int, float]]:
    return [(p.policy_version, p.fingerprint, p.loaded_checksum, p.canary_gap_max) for p in proofs]


def fenced(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split()[0] for record in caplog.records if "is fenced" in record.getMessage()]


def interfere(handle: Any, with_bucket: int, act: str) -> None:
    """Make a process kill itself, or falsify what it sends, when the numbered bucket of the next broadcast is due."""

    def patch(_: Any) -> None:
        from protocol.broadcast import Group

        real, seen = Group.broadcast, iter(range(1000))

        def broadcast(self: Any, buffer: Any) -> None:
            if next(seen) != with_bucket:
                return real(self, buffer)
            Group.broadcast = real
            if act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            buffer[-1] ^= 1
            return real(self, buffer)

        Group.broadcast = broadcast

    ray.get(handle.__ray_call__.remote(patch), timeout=60)


def test_a_broadcast_proves_bit_for_bit_what_the_object_store_proves(
    learner: LearnerGroup, pool: RolloutPool, ranks: list[Any], config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    announced = learner.publish(policy_version=1)
    assert announced.broadcast is not None
    assert announced.broadcast.rendezvous.address == "127.0.0.1"
    assert len(announced.manifest.bucket_bytes) > 2
    proofs = pool.load(announced)
    sampled = sample(pool, 1)
    assert not fenced(caplog)

    by_reference = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"weight_transfer": "object_store"})}
    )
    stored = LearnerGroup(by_reference, make=lambda rank, name: ranks[rank]).publish(policy_version=1)
    assert stored.broadcast is None
    assert stored.manifest == announced.manifest
    expected = pool.load(stored)
    assert content(proofs) == content(expected)
    assert [proof.worker for proof in proofs] == ["rollout-0", "rollout-1"]
    assert all(proof.canary_gap_max < 1e-4 for proof in proofs)
    assert sample(pool, 1) == sampled


def test_a_worker_killed_before_it_joins_holds_nobody_up(
    learner: LearnerGroup, pool: RolloutPool, caplog: pytest.LogCaptureFixture
) -> None:
    def die_instead(worker: Any) -> None:
        worker._engine.receive = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)

    publication = learner.publish(policy_version=2)
    ray.get(pool.members[0].handle.__ray_call__.remote(die_instead), timeout=60)
    with caplog.at_level(logging.WARNING):
        proofs = pool.load(publication)
    # The other one got the broadcast, without waiting for the dead; only the replacement used the object store.
    assert fenced(caplog) == ["rollout-0"]
    assert proofs[1].seconds < PUBLISH_S / 4
    assert [proof.worker for proof in proofs] == ["rollout-0.1", "rollout-1"]
    assert content(proofs)[0] == content(proofs)[1]
    assert len(sample(pool, 2)) == 8
    caplog.clear()
    assert [p.worker for p in pool.load(learner.publish(policy_version=3))] == ["rollout-0.1", "rollout-1"]
    assert not fenced(caplog)


def test_a_worker_killed_between_buckets_breaks_the_broadcast_and_nothing_else(
    learner: LearnerGroup, pool: RolloutPool, caplog: pytest.LogCaptureFixture
) -> None:
    victim, other = pool.members[1].name, pool.members[0].name
    interfere(pool.members[1].handle, 1, "kill")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        proofs = pool.load(learner.publish(policy_version=4))
    assert time.monotonic() - started < PUBLISH_S
    assert "the broadcast of version 4 did not reach everybody" in caplog.text
    assert victim in fenced(caplog)
    assert proofs[0].worker == other
    assert proofs[1].worker != victim
    assert content(proofs)[0] == content(proofs)[1]
    assert len(sample(pool, 4)) == 8


def test_a_corrupted_bucket_is_refused(
    learner: LearnerGroup, pool: RolloutPool, ranks: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    names = [member.name for member in pool.members]
    interfere(ranks[0], 1, "falsify")
    with caplog.at_level(logging.WARNING):
        proofs = pool.load(learner.publish(policy_version=5))
    assert "a bucket has the digest" in caplog.text
    assert sorted(fenced(caplog)) == sorted(names)  # and both came back through the object store, as they were
    assert [proof.worker for proof in proofs] == names
    assert len({proof.loaded_checksum for proof in proofs}) == 1


@pytest.mark.slow  # a third replacement, by the path of the first
def test_a_worker_lost_after_a_broadcast_catches_up_through_the_object_store(
    learner: LearnerGroup, pool: RolloutPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.load(learner.publish(policy_version=6))
    expected = sample(pool, 6)
    victim = pool.members[1].name
    ray.kill(pool.members[1].handle, no_restart=True)
    with caplog.at_level(logging.WARNING):
        found = sample(pool, 6)
    assert f"{victim} is lost" in caplog.text
    assert found == expected


def test_a_version_that_the_learner_no_longer_holds_cannot_be_sent_again(
    learner: LearnerGroup, pool: RolloutPool, directory: Path, config: RunConfig
) -> None:
    old = learner.publish(policy_version=7)
    new = learner.publish(policy_version=8)
    with pytest.raises(RuntimeError, match="version 7 cannot be sent again: the policy is version 8"):
        old.stored()
    learner.start_rl(policy=directory / "stale", reward_model=None, iterations=config.rounds.iterations)
    for publication in (old, new):
        with pytest.raises(RuntimeError, match="cannot be sent again: the policy has changed"):
            publication.stored()
