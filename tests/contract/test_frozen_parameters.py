"""One suite for every training engine: what is frozen stays as it is, and is in no checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.learner import LearnerConfig, OptimizerConfig
from configs.models import LoraConfig, TrainedPartConfig
from learner import adapters
from learner.training import TrainingEngine
from tests.learner_batches import single_rank, tiny_policy
from tests.plain_engine import PlainEngine

RATE = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
PARTS = {
    "adapter": TrainedPartConfig(lora=LoraConfig(rank=4)),
    "last-block": TrainedPartConfig(last_blocks=1),
}
KINDS = ("plain", "zero-0-fp32", "zero-2-fp32", "zero-3-fp32", "zero-1-bf16", "zero-3-bf16")
Make = Callable[..., TrainingEngine]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Any:
    engines: list[TrainingEngine] = []

    def build(part: str, *, tied: bool = False, **settings: Any) -> TrainingEngine:
        policy = tiny_policy(hidden=128, tied=tied)
        adapters.choose(policy, PARTS[part], seed=1, where="models.policy.train")
        if request.param == "plain":
            engines.append(PlainEngine(policy, optimizer=RATE, settings=LearnerConfig(**settings), name="policy"))
            return engines[-1]
        context = single_rank()
        from learner.engine import DeepSpeedEngine

        _, stage, precision = request.param.split("-")
        config = LearnerConfig(zero_stage=int(stage), precision=precision, **settings)
        policy = policy.to(torch.bfloat16) if precision == "bf16" else policy
        engines.append(DeepSpeedEngine(policy, optimizer=RATE, settings=config, context=context, name="policy"))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def learn(engine: TrainingEngine, *, steps: int = 2) -> None:
    ids = torch.arange(2, 40)[None]
    positions = torch.arange(38)
    for _ in range(steps):
        logprobs, _ = engine.forward(ids, positions[None], positions[:-1], ids[0, 1:])
        engine.backward(-logprobs.sum() / 37, last=True)
        assert engine.step().applied


def weights(engine: TrainingEngine) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in engine.gather(list(engine.parameter_shapes())).items()}


def trained(engine: TrainingEngine) -> set[str]:
    return {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("part", PARTS)
def test_steps_change_what_is_trained_and_nothing_else(make: Make, part: str) -> None:
    engine = make(part)
    before = weights(engine)
    learn(engine)
    after = weights(engine)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained(engine)
    assert 0 < len(trained(engine)) < len(before)


def test_a_gradient_has_what_is_trained(make: Make) -> None:
    engine = make("adapter")
    ids, positions = torch.arange(2, 40)[None], torch.arange(38)
    engine.backward(engine.forward(ids, positions[None], positions[:-1], ids[0, 1:])[0].sum(), last=True)
    gradient = engine.full_gradient()
    assert set(gradient) == trained(engine)
    norm = torch.cat([g.flatten().float() for g in gradient.values()]).norm()
    assert engine.measure() == pytest.approx(float(norm), rel=1e-3)


def test_a_checkpoint_holds_the_adapter_alone_and_continues_bit_for_bit(make: Make, tmp_path: Path) -> None:
    engine = make("adapter", tied=True)  # a state dict has the embeddings twice then
    learn(engine)
    engine.save(tmp_path)
    restored = make("adapter", tied=True)
    restored.load(tmp_path)
    assert restored.num_steps == 2
    for twin in (engine, restored):
        learn(twin, steps=1)
    ours, theirs = weights(engine), weights(restored)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if isinstance(engine, PlainEngine):
        return
    # fp32 and two moments of each trained element, the parameters once more, and a few kilobytes of names.
    elements = sum(engine.parameter_shapes()[name].numel() for name in trained(engine))
    everything = sum(shape.numel() for shape in engine.parameter_shapes().values())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    assert size < 20 * elements + 200_000
    assert size < 4 * everything


def test_a_checkpoint_of_another_choice_is_refused(make: Make, tmp_path: Path) -> None:
    engine = make("adapter")
    if isinstance(engine, PlainEngine):
        pytest.skip("the yardstick restores whole modules")
    engine.save(tmp_path)
    with pytest.raises(ValueError, match="of another network"):
        make("last-block").load(tmp_path)


def test_merged_weights_are_the_same_under_every_engine(make: Make) -> None:
    engine = make("adapter")
    learn(engine)
    own = weights(engine)
    view = adapters.merged(engine)
    assert {n: tuple(s) for n, s in view.parameter_shapes().items()} == {
        n: tuple(p.shape) for n, p in tiny_policy(hidden=128).named_parameters()
    }
    for name, tensor in view.gather(list(view.parameter_shapes())).items():
        stem = name.removesuffix(".weight")
        if f"{stem}.base_layer.weight" not in own:
            assert torch.equal(tensor, own[name])
            continue
        a, b = (own[f"{stem}.lora_{part}.default.weight"].double() for part in "AB")
        exact = own[f"{stem}.base_layer.weight"].double() + 2.0 * (b @ a) * 16 / 4
        assert tensor.shape == exact.shape
        rounding = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
        assert (tensor.double() - exact).abs().max() <= rounding * exact.abs().max()
