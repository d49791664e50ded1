"""Two ranks as Ray actors: they connect, learn from references, publish, save, and come back as they were."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.learner_group import LearnerGroup
from configs.load import load
from configs.run import RunConfig
from learner.records import read_batch
from learner.worker import environment, remote_class
from protocol import metrics as names
from protocol.errors import LearnerLostError, RollbackError, UntrustedBatchError
from protocol.messages import ReferenceLogprobs, RewardScores, RolloutMeta
from protocol.roles import RolloutRef, ScoredGroup, ScoredReferences, ScoringSummary
from protocol.weights import WeightManifest, digest
from tests.learner_batches import scored_batch, tiny_critic
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_overrides

OVERRIDES = (
    *("learner.workers=2", "learner.zero_stage=3", "learner.bucket_mib=0.1", "rollout.responses_per_iteration=16"),
    # The batches are drawn at random: no policy has sampled them.
    *(f"learner.guards.{name}=null" for name in ("logprob_gap_mean_nats", "ratio_p999", "ess_fraction")),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    critic = tiny_critic()
    critic.network.config.rondo_calibration = {"gain": 2.0, "bias": 0.5}
    critic.network.save_pretrained(root / "reward")
    return tiny_llama(root / "policy"), root / "reward"


def start(config: RunConfig, models: tuple[Path, Path], directory: Path) -> list[Any]:
    make = remote_class().options(num_cpus=1, runtime_env={"env_vars": environment(config)})
    ranks = [make.remote(rank=r, world_size=2, config=config, run_directory=directory) for r in range(2)]
    address, port = ray.get(ranks[0].address.remote(), timeout=60)
    assert address == "127.0.0.1"
    ray.get([rank.connect.remote(address, port) for rank in ranks], timeout=60)
    ray.get(
        [rank.start_rl.remote(policy=models[0], reward_model=models[1], iterations=3) for rank in ranks], timeout=60
    )
    return ranks


def groups_of(iteration: int, version: int = 1) -> list[tuple[list[Any], Any, Any]]:
    """Put a batch into the object store as the scoring pool leaves it: in groups, the second half first."""
    rollouts = scored_batch(16, seed=iteration, iteration=iteration, policy_version=version).rollouts
    found = []
    for part in (rollouts[8:], rollouts[:8]):
        keys = tuple(scored.rollout.key for scored in part)
        scores = np.array([scored.score for scored in part], dtype=np.float32)
        rewards = RewardScores(keys=keys, scores=scores, components={"rm": scores}, gold={}, busy_s=0.0)
        reference = ReferenceLogprobs(keys=keys, logprobs=tuple(scored.ref_logprobs for scored in part))
        found.append(
            ([RolloutRef(ray.put((scored.rollout,)), 0) for scored in part], ray.put(rewards), ray.put(reference))
        )
    return found


def learn(ranks: list[Any], iteration: int, *, version: int) -> Any:
    groups = groups_of(iteration, version)
    ray.get([rank.receive.remote(groups) for rank in ranks], timeout=60)
    reports = ray.get([rank.update.remote(round=1, iteration=iteration) for rank in ranks], timeout=120)
    assert reports[0] == reports[1]
    return reports[0]


def publish(ranks: list[Any], version: int) -> tuple[list[Any], WeightManifest]:
    streams = [rank.publish.remote(version) for rank in ranks]
    first, second = ([ray.get(ref, timeout=60) for ref in stream] for stream in streams)
    assert not second
    return first[:-1], first[-1]


def test_two_ranks_learn_publish_and_resume(cluster: None, models: tuple[Path, Path], tmp_path: Path) -> None:
    config = load("quickstart", tiny_overrides(tmp_path, *OVERRIDES))
    ranks = start(config, models, tmp_path)
    before, manifest = publish(ranks, 1)
    assert manifest.bucket_digests == tuple(digest(bucket) for bucket in before)

    report = learn(ranks, 0, version=1)
    assert report.metrics[names.POLICY_FIRST_RATIO_GAP] < 1e-4
    after, manifest = publish(ranks, 2)
    assert len(after) == len(before) > 2
    assert any(not np.array_equal(old, new) for old, new in zip(before, after, strict=True))

    keys = list(report.kl_nats_per_sequence)[:2]
    samples = ray.get(ranks[0].samples.remote(keys), timeout=60)
    assert [sample.key for sample in samples] == keys
    assert samples[0].prompt == "prompt 0"
    ray.get(ranks[0].write_rollouts.remote(tmp_path / "rollouts.parquet"), timeout=60)
    assert (tmp_path / "rollouts.parquet").exists()
    status = status_of(ranks[1])
    assert (status["rank"], status["policy_version"]) == (1, 2)

    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    ray.get([rank.save.remote(checkpoint) for rank in ranks], timeout=60)
    # What another version has sampled is refused, and leaves no trace: the resumed ranks never meet it.
    for version in (1, 3):
        with pytest.raises(UntrustedBatchError, match=rf"r1/i1/p0000#0 was sampled by version {version} .* is 2"):
            learn(ranks, 1, version=version)
    expected = learn(ranks, 1, version=2), publish(ranks, 3)[1]
    for rank in ranks:
        ray.kill(rank, no_restart=True)
    ranks = start(config, models, tmp_path)
    ray.get([rank.load.remote(checkpoint) for rank in ranks], timeout=60)
    assert status_of(ranks[0])["policy_version"] == 2
    assert (learn(ranks, 1, version=2), publish(ranks, 3)[1]) == expected
    for rank in ranks:
        ray.kill(rank, no_restart=True)


def test_a_batch_that_cannot_be_learned_from_is_kept(cluster: None, models: tuple[Path, Path], tmp_path: Path) -> None:
    config = load("quickstart", tiny_overrides(tmp_path, *OVERRIDES))
    ranks = start(config, models, tmp_path)
    publish(ranks, 1)
    groups = broken_groups()
    ray.get([rank.receive.remote(groups) for rank in ranks], timeout=60)
    refs = [rank.update.remote(round=1, iteration=0) for rank in ranks]
    for ref in refs:
        with pytest.raises(RuntimeError, match=r"score is not finite at rollout r1/i0/p0011#0"):
            ray.get(ref, timeout=60)
    kept = tmp_path / "incidents" / "nonfinite-r001-i000000.parquet"
    incident = json.loads(kept.with_suffix(".json").read_text())
    assert incident["data"] == {"batch": kept.name, "policy_steps": 0, "critic_steps": 0}
    assert incident["action"] == "the run stops"
    replay = read_batch(kept)
    assert (replay.batch.round, replay.batch.iteration, replay.batch.policy_version) == (1, 0, 1)
    assert replay.settings == {"run_seed": 0, "kl_beta": 0.0}  # APA has its KL in the loss
    assert [math.isnan(scored.score) for scored in replay.batch.rollouts].index(True) == 11
    for rank in ranks:
        ray.kill(rank, no_restart=True)


def broken_groups(iteration: int = 0) -> list[tuple[list[Any], Any, Any]]:
    """A batch in which one score is not finite."""
    groups = groups_of(iteration)
    rewards = ray.get(groups[0][1])
    scores = rewards.scores.copy()
    scores[3] = np.nan
    broken = RewardScores(keys=rewards.keys, scores=scores, components={}, gold={}, busy_s=0.0)
    return [(groups[0][0], ray.put(broken), groups[0][2]), *groups[1:]]


@pytest.mark.slow
def test_a_group_refuses_a_batch_as_one_and_a_rank_that_hangs_costs_a_measured_deadline(
    cluster: None, models: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = ("cluster.deadlines.floor_s=4", "cluster.deadlines.multiple=2", "learner.on_nonfinite=rollback")
    config = load("quickstart", tiny_overrides(tmp_path, *OVERRIDES, *settings))
    make = remote_class().options(num_cpus=1, runtime_env={"env_vars": environment(config)})
    group = LearnerGroup(
        config,
        make=lambda rank, name: make.remote(rank=rank, world_size=2, config=config, run_directory=tmp_path),
    )
    group.started()
    group.start_rl(policy=models[0], reward_model=models[1], iterations=9)
    group.publish(policy_version=1)
    for iteration in range(3):
        group.update(references(groups_of(iteration)), round=1, iteration=iteration)
    with pytest.raises(
        RollbackError, match=r"iteration 3 of round 1: score is not finite at rollout r1/i3/"
    ) as refused:
        group.update(references(broken_groups(3)), round=1, iteration=3)
    assert refused.value.place == (1, 3)
    incident = json.loads((tmp_path / "incidents" / "nonfinite-r001-i000003.json").read_text())
    assert incident["action"] == "all ranks go back to the last checkpoint"

    def hang(rank: Any) -> None:
        rank._rank.update = lambda *args, **kwargs: time.sleep(1000)

    ray.get(group.members[1].handle.__ray_call__.remote(hang))
    began = time.monotonic()
    with pytest.raises(LearnerLostError) as error:
        group.update(references(groups_of(3)), round=1, iteration=3)
    assert time.monotonic() - began < 60  # learn_s is 3600 s
    text = str(error.value)
    assert "learner.update on 2 ranks: 2 of 2 did not answer within cluster.deadlines." in text
    assert "the longest of the last 3 took" in text
    assert text.endswith(": learner-0, learner-1")
    assert "lambda" in error.value.stacks["learner-1"]
    assert "lambda" not in error.value.stacks["learner-0"]  # it waits for the other in a collective
    group.stop()


def references(found: list[tuple[list[Any], Any, Any]]) -> ScoredReferences:
    groups = tuple(
        ScoredGroup(
            metas=tuple(RolloutMeta.of(ray.get(ref.step)[0]) for ref in rollouts),
            rollouts=tuple(rollouts),
            rewards=rewards,
            reference=reference,
        )
        for rollouts, rewards, reference in found
    )
    return ScoredReferences(
        groups=groups, summary=ScoringSummary(means={}, scores={}, components={}, gold={}, kl_nats={}, busy_s={})
    )


def status_of(worker: Any) -> dict[str, Any]:
    return ray.get(worker.status.remote(), timeout=60)
