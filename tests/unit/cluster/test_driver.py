"""One iteration over roles that lose a batch: nothing is learned twice, and the same requests are made again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.driver import Clock, Roles, iterate
from cluster.schedule import Phase, RunState
from configs.run import RunConfig
from protocol import metrics as names
from protocol.errors import LostDataError
from protocol.messages import (
    PolicyVersions,
    Prompt,
    RolloutKey,
    RolloutMeta,
    RolloutRequest,
    SampleText,
    UpdateReport,
)
from protocol.roles import Finished, Publication, RolloutRef, ScoredGroup, ScoredReferences, ScoringSummary
from protocol.weights import Canary, VersionProof, WeightManifest
from tests.tiny_run import tiny_config


class World:
    """All roles at once. `losses` says at which stage a batch is lost, in turn."""

    def __init__(self, losses: Sequence[str]) -> None:
        self.losses = list(losses)
        self.taken = 0
        self.asked: list[list[tuple[RolloutKey, int]]] = []
        self.learned: list[list[RolloutKey]] = []
        self.metas: list[RolloutMeta] = []

    def take(self, num: int) -> list[Prompt]:
        self.taken += num
        return [Prompt(prompt_id=f"p{n}", token_ids=np.array([1], np.int32), text="p") for n in range(num)]

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        self.asked.append([(request.key, request.seed) for request in requests])
        for place, request in enumerate(requests):
            meta = RolloutMeta(
                key=request.key,
                prompt_tokens=1,
                response_tokens=2,
                finish_reason="stop",
                policy_versions=PolicyVersions(policy_version, policy_version),
                repeated_fraction=0.0,
            )
            yield Finished(meta=meta, payload=RolloutRef(step=place, place=0))

    def begin(self, keys: Sequence[RolloutKey]) -> None:
        self.metas = []

    def add(self, finished: Finished) -> None:
        self.metas.append(finished.meta)

    def collect(self) -> ScoredReferences:
        self._lose("score")
        group = ScoredGroup(metas=tuple(self.metas), rollouts=(), rewards=None, reference=None)
        summary = ScoringSummary(means={}, scores={}, components={}, gold={}, kl_nats={}, busy_s={})
        return ScoredReferences(groups=(group,), summary=summary)

    def update(self, batch: ScoredReferences, *, round: int, iteration: int) -> UpdateReport:
        self._lose("learn")
        self.learned.append([meta.key for meta in batch.metas])
        return UpdateReport(metrics={}, num_steps=1, num_skipped_steps=0, kl_nats_per_sequence={})

    def publish(self, *, policy_version: int) -> Publication:
        manifest = WeightManifest(
            policy_version=policy_version,
            slots=(),
            bucket_bytes=(),
            bucket_digests=(),
            loaded_checksum=0,
            canary=Canary(token_ids=(), logprobs=()),
        )
        return Publication(manifest=manifest)

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        return (
            VersionProof(
                worker="w", policy_version=1, fingerprint="", loaded_checksum=0, canary_gap_max=0.0, seconds=0.0
            ),
        )

    def samples(
        self, batch: ScoredReferences, *, keys: Sequence[RolloutKey], report: UpdateReport
    ) -> tuple[SampleText, ...]:
        return ()

    def _lose(self, stage: str) -> None:
        if self.losses and self.losses[0] == stage:
            self.losses.pop(0)
            raise LostDataError(f"gone at {stage}")


def roles(world: World, lost: list[str], *, allowed: int = 9) -> Roles:
    def take_note(error: LostDataError) -> None:
        lost.append(str(error))
        if len(lost) > allowed:
            raise error

    return Roles(rollouts=world, scoring=world, learner=world, prompts=world, lost=take_note)  # pyright: ignore[reportArgumentType] - no save, no load


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path)


STATE = RunState(phase=Phase.OPTIMISE)


def test_a_batch_that_is_gone_is_sampled_again_with_the_same_keys_and_seeds(config: RunConfig) -> None:
    world, lost = World(["score", "learn"]), list[str]()
    report = iterate(roles(world, lost), config, STATE)
    assert lost == ["gone at score", "gone at learn"]
    assert world.taken == 16  # once
    assert len(world.asked) == 3
    assert world.asked[0] == world.asked[1] == world.asked[2]
    assert world.learned == [[key for key, _ in world.asked[0]]]
    assert report.metrics[names.COUNTER_PROMPTS] == 16


def test_who_takes_note_of_losses_bounds_them(config: RunConfig) -> None:
    world, lost = World(["score"] * 5), list[str]()
    with pytest.raises(LostDataError):
        iterate(roles(world, lost, allowed=2), config, STATE)
    assert len(world.asked) == 3
    assert world.learned == []


def test_a_stage_that_comes_twice_counts_twice() -> None:
    clock = Clock(seconds={"a": 100.0})
    with pytest.raises(LostDataError), clock.stage("a"):
        raise LostDataError("gone")
    assert 100.0 < clock.seconds["a"] < 101.0
