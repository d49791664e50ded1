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

from cluster.pool import Anywhere, Pool
from cluster.scoring_pool import ScoringPool
from configs.cluster import DeadlinesConfig
from configs.load import load
from protocol.errors import WorkersLostError
from protocol.incidents import Incident
from protocol.messages import ReferenceSummary, RewardScores, RolloutKey

DEADLINES = DeadlinesConfig(silence_s=4.0, start_s=60.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0, concurrency_groups={"control": 1}, max_restarts=0)
class Worker:
    """Does what its fate says: "dies" or "raises" at the start, "dies at work", "hangs at work", or all goes well."""

    def __init__(self, name: str, fate: str) -> None:
        self.name, self.fate = name, fate
        self.loads: list[dict[str, Any]] = []
        if fate == "dies":
            os._exit(1)
        if fate == "raises":
            raise ValueError("no such model")

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        return {"state": "idle", "pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}

    def load(self, **what: Any) -> None:
        if self.fate == "dies loading":
            os._exit(1)
        self.loads.append(what)

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
        return ReferenceSummary(keys=keys, behavior_kl_nats=[0.0] * len(keys), busy_s=0.0), self.name  # pyright: ignore[reportArgumentType]

    def _work(self) -> None:
        if self.fate == "dies at work":
            os._exit(1)
        if self.fate == "hangs at work":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fate == "is slow":
            time.sleep(3.0)


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
