"""The learner's state names the ranks and the ZeRO stage that wrote it, and is not loaded into others."""

import json
from pathlib import Path

import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from learner import checkpoint
from learner.checkpoint import LearnerState
from learner.training import RankContext
from protocol.errors import UserError
from tests.learner_batches import tiny_policy
from tests.plain_engine import PlainEngine


def engine(*, world_size: int = 1, seed: int = 0) -> PlainEngine:
    context = RankContext(rank=0, world_size=world_size, device=torch.device("cpu"))
    return PlainEngine(
        tiny_policy(seed=seed), optimizer=OptimizerConfig(), settings=LearnerConfig(), context=context, name="policy"
    )


def weights(found: PlainEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in found.module.parameters()])


def test_a_learner_of_another_size_or_stage_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    state = LearnerState(policy_version=4, kl_controller=None, world_size=2, zero_stage=3, negative_kls=2)
    saved = engine(world_size=2)
    checkpoint.save(tmp_path, engines={"policy": saved}, state=state)
    assert json.loads((tmp_path / "learner.json").read_text()) == {
        "policy_version": 4,
        "kl_controller": None,
        "world_size": 2,
        "zero_stage": 3,
        "negative_kls": 2,
    }
    for world_size, zero_stage in ((1, 3), (2, 2), (4, 0)):
        other = engine(world_size=world_size, seed=1)
        before = weights(other)
        with pytest.raises(UserError, match=r"go back to learner\.workers=2 learner\.zero_stage=3"):
            checkpoint.load(tmp_path, engines={"policy": other}, zero_stage=zero_stage)
        assert torch.equal(weights(other), before)
    same = engine(world_size=2, seed=1)
    assert checkpoint.load(tmp_path, engines={"policy": same}, zero_stage=3) == state
    assert torch.equal(weights(same), weights(saved))


def test_a_checkpoint_from_before_negative_kls_were_counted_is_read(tmp_path: Path) -> None:
    saved = engine()
    state = LearnerState(policy_version=4, kl_controller={"beta": 0.1}, world_size=1, zero_stage=0, negative_kls=2)
    checkpoint.save(tmp_path, engines={"policy": saved}, state=state)
    text = json.loads((tmp_path / "learner.json").read_text())
    del text["negative_kls"]
    (tmp_path / "learner.json").write_text(json.dumps(text))
    found = checkpoint.load(tmp_path, engines={"policy": engine()}, zero_stage=0)
    assert (found.kl_controller, found.negative_kls) == ({"beta": 0.1}, 0)
