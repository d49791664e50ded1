"""Pools over real processes that die, hang and fail where it hurts; what they compute is left out."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from actors.errors import EngineFailedError
from cluster.pool import Anywhere, Pool
from cluster.rollout_pool import RolloutPool
from cluster.scoring_pool import ScoringPool
from cluster.supervision import wait
from configs.cluster import DeadlinesConfig
from configs.load import load
from configs.rollout import RolloutConfig
from protocol.errors import LostDataError, WorkersLostError
from protocol.incidents import Incident
from protocol.messages import ReferenceSummary, RewardScores, RolloutKey
from protocol.weights import VersionProof

DEADLINES = DeadlinesConfig(silence_s=4.0, start_s=60.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


class _Worker:
    """Does what its fate says, at the start, while it loads or at work; otherwise all goes well."""

    def __init__(self, name: str, fate: str) -> None:
        self.name, self.fate = name, fate
        self.loads = self.steps = 0
        if fate == "dies":
            os._exit(1)
        if fate == "raises":
            raise ValueError("no such model")

    @ray.method(concurrency_group="control")
    def status(self) -> Any:
        self.steps += 1
        node_id = ray.get_runtime_context().get_node_id()
        return SimpleNamespace(state="idle", pid=os.getpid(), node_id=node_id, engine_steps=self.steps)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self.loads += 1
        if self.fate == "dies loading":
            os._exit(1)
        lies = self.fate == "lies" or (self.fate == "lies once" and self.loads == 1)
        return VersionProof(
            worker=self.name, policy_version=1, fingerprint="other" if lies else "right", loaded_checksum=7,
            canary_gap_max=0.0, seconds=0.0,
        )  # fmt: skip

    def generate(self, requests: list[Any], *, policy_version: int) -> Iterator[Any]:
        for request in requests:
            self._work()
            yield self.name
            yield [SimpleNamespace(key=request.key)]

    def fetch(self) -> None:
        ray.get(_remote(num_cpus=0)(lambda: time.sleep(30)).remote(), timeout=0.2)

    @ray.method(num_returns=2)
    def score(self, payloads: list[Any]) -> tuple[Any, Any]:
        self._work()
        keys = tuple(payloads)
        scored = RewardScores(keys=keys, scores=[1.0] * len(keys), components={}, gold={}, busy_s=0.0)  # pyright: ignore[reportArgumentType]
        return scored, self.name

    @ray.method(num_returns=2)
    def logprobs(self, payloads: list[Any]) -> tuple[Any, Any]:
        self._work()
        keys = tuple(payloads)
        return ReferenceSummary(keys=tuple(keys), behavior_kl_nats=dict.fromkeys(keys, 0.0), busy_s=0.0), self.name

    def _work(self) -> None:
        if self.fate == "dies at work":
            os._exit(1)
        if self.fate == "hangs at work":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fate == "is busy":
            time.sleep(1000)
        if self.fate == "is slow":
            time.sleep(0.4)
        if self.fate == "breaks":
            raise EngineFailedError("the engine of rollout-1 failed: out of memory\nTraceback: in kernel_42")


_remote: Any = ray.remote  # Ray's own annotations do not know concurrency_groups
Worker = _remote(num_cpus=0, concurrency_groups={"control": 1}, max_restarts=0)(_Worker)


class Fates:
    """Starts workers, each with the next fate of its place; those without one have a good one."""

    def __init__(self, **fates: list[str]) -> None:
        self._fates = {name.replace("_", "-"): iter(listed) for name, listed in fates.items()}
        self.started: list[str] = []

    def __call__(self, index: int, name: str) -> Any:
        self.started.append(name)
        return Worker.remote(name, next(self._fates.get(name.split(".")[0], iter(())), "lives"))


def pool_of(make: Callable[[int, str], Any], report: Callable[[Incident], None], *, replacements: int) -> Pool:
    return Pool(
        role="reward", places=Anywhere(range(2)), make=make, deadlines=DEADLINES, replacements=replacements,
        report=report,
    )  # fmt: skip


@pytest.fixture
def incidents() -> list[Incident]:
    return []


def test_workers_that_die_while_the_pool_starts_are_replaced_within_the_budget(
    cluster: None, incidents: list[Incident]
) -> None:
    fates = Fates(reward_1=["dies", "dies"])
    pool = pool_of(fates, incidents.append, replacements=2)
    assert list(pool.started()) == ["reward-0", "reward-1.2"]
    assert [(i.kind, i.where) for i in incidents] == [("worker_lost", "reward-1"), ("worker_lost", "reward-1.1")]
    pool.stop()
    pool = pool_of(Fates(reward_0=["dies"] * 3), incidents.append, replacements=2)
    with pytest.raises(WorkersLostError, match=r"reward-0\.2 failed and cluster\.worker_replacements is used up"):
        pool.started()
    pool.stop()


def test_what_a_constructor_raises_at_the_start_is_not_tried_again(cluster: None, incidents: list[Incident]) -> None:
    fates = Fates(reward_0=["raises"])
    pool = pool_of(fates, incidents.append, replacements=2)
    with pytest.raises(ActorDiedError, match="no such model"):
        pool.started()
    assert fates.started == ["reward-0", "reward-1"]
    assert incidents == []
    pool.stop()


class Scoring:
    """A scoring pool, and a batch of four groups for it."""

    def __init__(self, report: Callable[[Incident], None], fates: Fates) -> None:
        config = load("quickstart", ["scoring.workers=2", "scoring.reference_workers=1", "scoring.group_responses=2"])
        self.pool = ScoringPool(
            config.scoring, DEADLINES, make_reward=fates, make_reference=fates, replacements=3, report=report
        )
        self.keys = [RolloutKey(0, 0, "p", sample) for sample in range(8)]

    def scores(self) -> dict[RolloutKey, float]:
        self.pool.begin(self.keys)
        for key in self.keys:
            self.pool.add(SimpleNamespace(meta=SimpleNamespace(key=key), payload=key))  # pyright: ignore[reportArgumentType]
        return dict(self.pool.collect().summary.scores)


@pytest.mark.parametrize("fate", ["dies", "raises", "dies loading"])
def test_a_scoring_worker_whose_replacement_dies_is_replaced_again(
    cluster: None, incidents: list[Incident], fate: str
) -> None:
    fates = Fates(reward_0=["dies at work", fate, "lives"])
    scoring = Scoring(incidents.append, fates)
    scoring.pool.started()
    assert scoring.scores() == dict.fromkeys(scoring.keys, 1.0)
    assert [i.where for i in incidents] == ["reward-0", "reward-0.1"]
    assert [member.name for member in scoring.pool.rewards.members] == ["reward-0.2", "reward-1"]
    scoring.pool.stop()


def test_a_reference_worker_that_hangs_is_noticed_while_rewards_are_scored(
    cluster: None, incidents: list[Incident]
) -> None:
    scoring = Scoring(incidents.append, Fates(reference_0=["hangs at work"], reward_0=["is slow"], reward_1=["breaks"]))
    scoring.pool.started()
    assert scoring.scores() == dict.fromkeys(scoring.keys, 1.0)
    assert [(i.kind, i.where) for i in incidents] == [("worker_lost", "reward-1"), ("worker_silent", "reference-0")]
    scoring.pool.stop()


class Rollouts:
    """A rollout pool of two, each with its share of sixty requests."""

    def __init__(self, report: Callable[[Incident], None], fates: Fates, **deadlines: float) -> None:
        bounds = DeadlinesConfig(silence_s=4.0, **deadlines)
        config = RolloutConfig(workers=2)
        self.pool = RolloutPool(config, bounds, make=fates, replacements=3, report=report)
        self.pool.started()
        self.requests: list[Any] = [SimpleNamespace(key=RolloutKey(0, 0, "p", sample)) for sample in range(60)]
        self.publication: Any = SimpleNamespace(
            manifest=SimpleNamespace(policy_version=1, fingerprint="right", loaded_checksum=7),
            broadcast=None,
            stored=tuple,
        )

    def sampled(self) -> Iterator[Any]:
        for finished in self.pool.generate(self.requests, policy_version=1):
            yield finished.meta.key

    def everything(self) -> set[Any]:
        return {request.key for request in self.requests}


def test_a_rollout_worker_that_hangs_is_noticed_while_another_delivers(
    cluster: None, incidents: list[Incident]
) -> None:
    rollouts = Rollouts(incidents.append, Fates(rollout_0=["is slow"], rollout_1=["hangs at work"]))  # 12 s, for ever
    seen, noticed = [], None
    for key in rollouts.sampled():
        seen.append(key)
        noticed = noticed or (len(seen) if incidents else None)
    assert noticed is not None
    assert noticed < 30
    assert sorted(seen) == sorted(rollouts.everything())
    assert [(i.kind, i.where) for i in incidents] == [("worker_silent", "rollout-1")]
    rollouts.pool.stop()


def test_the_batch_has_a_deadline_while_a_worker_delivers(cluster: None, incidents: list[Incident]) -> None:
    fates = Fates(rollout_0=["is slow"], rollout_1=["is busy"])  # one delivers for 12 s, the other never
    rollouts = Rollouts(incidents.append, fates, generate_s=6.0)
    assert sorted(rollouts.sampled()) == sorted(rollouts.everything())
    assert {(i.kind, i.where) for i in incidents} == {("worker_late", "rollout-0"), ("worker_late", "rollout-1")}
    assert all("cluster.deadlines.generate_s = 6 s" in i.cause for i in incidents)
    rollouts.pool.stop()


def test_what_broke_an_engine_is_in_the_incident(cluster: None, incidents: list[Incident]) -> None:
    rollouts = Rollouts(incidents.append, Fates(rollout_1=["breaks"]))
    assert sorted(rollouts.sampled()) == sorted(rollouts.everything())
    [incident] = incidents
    assert incident.what == "rollout-1 is lost: the engine of rollout-1 failed: out of memory"
    assert "in kernel_42" in str(incident.cause)
    rollouts.pool.stop()


@pytest.mark.parametrize(
    ("fate", "expected"),
    [
        ("lies once", [("worker_lost", "rollout-1"), ("worker_fenced", "rollout-1.1")]),
        (
            "lies",
            [("worker_lost", "rollout-1"), ("worker_fenced", "rollout-1.1"), ("worker_lost", "rollout-1.1")],
        ),
    ],
)
def test_a_replacement_without_a_proof_in_mid_batch_loads_again_and_is_replaced_in_turn(
    cluster: None, incidents: list[Incident], fate: str, expected: list[tuple[str, str]]
) -> None:
    rollouts = Rollouts(incidents.append, Fates(rollout_1=["dies at work", fate]))
    rollouts.pool.load(rollouts.publication)
    assert sorted(rollouts.sampled()) == sorted(rollouts.everything())
    assert [(i.kind, i.where) for i in incidents] == expected
    rollouts.pool.stop()


def test_a_replacement_that_dies_after_a_publish_is_replaced_again(cluster: None, incidents: list[Incident]) -> None:
    rollouts = Rollouts(incidents.append, Fates(rollout_1=["dies loading", "dies", "dies loading"]))
    proofs = rollouts.pool.load(rollouts.publication)
    assert [proof.worker for proof in proofs] == ["rollout-0", "rollout-1.3"]
    assert [i.where for i in incidents] == ["rollout-1", "rollout-1.1", "rollout-1.2"]
    rollouts.pool.stop()


def test_a_timeout_inside_a_worker_is_lost_data_and_no_late_worker(cluster: None) -> None:
    worker = Worker.remote("reward-0", "lives")
    with pytest.raises(LostDataError, match=r"was to fetch did not come: .*; it was ray::.*fetch.*pid=\d+"):
        wait([worker.fetch.remote()], deadline_s=60.0, what="fetching", key="cluster.deadlines.score_s")
    ray.kill(worker)
