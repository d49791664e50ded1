"""One suite for every training engine: gradients add up, steps are AdamW's, bad numbers never reach the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.learner import LearnerConfig, OptimizerConfig
from learner.batch import MicroBatch, TokenSequence, collate
from learner.training import TrainingEngine
from protocol.errors import NonFiniteError
from tests.learner_batches import scored_batch, single_rank, tiny_policy
from tests.plain_engine import PlainEngine

KINDS = ("plain", "zero-0", "zero-1", "zero-2", "zero-3")
RATE = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, schedule="linear", warmup_steps=1)
Make = Callable[..., TrainingEngine]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Any:
    engines: list[TrainingEngine] = []

    def build(**settings: Any) -> TrainingEngine:
        common = {"optimizer": RATE, "name": "policy", "total_steps": 10}
        if request.param == "plain":
            engines.append(PlainEngine(tiny_policy(), settings=LearnerConfig(**settings), **common))
        else:
            context = single_rank()
            from learner.engine import DeepSpeedEngine

            stage = int(request.param.removeprefix("zero-"))
            config = LearnerConfig(zero_stage=stage, **settings)
            engines.append(DeepSpeedEngine(tiny_policy(hidden=128), settings=config, context=context, **common))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def micro_batches() -> list[MicroBatch]:
    rollouts = [scored.rollout for scored in scored_batch(6).rollouts]
    sequences = [TokenSequence(r.prompt.token_ids, r.response_ids) for r in rollouts]
    parts = (sequences[:3], [], sequences[3:])
    return [collate(part, pad_id=0, layout="sorted") for part in parts]


def call(forward: Callable[..., Any], m: MicroBatch) -> Tensor:
    return forward(m.input_ids, m.position_ids, m.predict_index, m.target_ids)[0]


def accumulate(engine: TrainingEngine, *, scale: float = 1.0) -> None:
    batches = micro_batches()
    for number, m in enumerate(batches):
        engine.backward(scale * -call(engine.forward, m).sum() / 50, last=number == len(batches) - 1)


def weights(engine: TrainingEngine) -> Tensor:
    found = engine.gather(list(engine.parameter_shapes()))
    return torch.cat([tensor.flatten().clone() for tensor in found.values()])


def twin_of(engine: TrainingEngine) -> torch.nn.Module:
    return tiny_policy() if isinstance(engine, PlainEngine) else tiny_policy(hidden=128)


def test_gradients_of_micro_batches_add_up(make: Make) -> None:
    engine = make()
    accumulate(engine)
    found = engine.full_gradient()
    twin = twin_of(engine)
    (-sum(call(twin, m).sum() for m in micro_batches()) / 50).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


def test_steps_are_clipped_adamw(make: Make) -> None:
    engine = make(max_grad_norm=0.5)
    twin = twin_of(engine)
    groups = [[p for p in twin.parameters() if p.ndim >= 2], [p for p in twin.parameters() if p.ndim < 2]]
    adamw = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(3):
        accumulate(engine)
        result = engine.step()
        (-sum(call(twin, m).sum() for m in micro_batches()) / 50).backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm().item()
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5
        assert result.applied
        rate = 1e-2 * (1.0 if step == 0 else 1 - 0.9 * (step - 1) / 9)
        assert result.learning_rate == pytest.approx(rate)
        for parameter in twin.parameters():
            parameter.grad *= 0.5 / norm
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
    assert engine.num_steps == 3
    expected = torch.cat([p.detach().flatten() for p in twin.parameters()])
    moved = expected - torch.cat([p.detach().flatten() for p in twin_of(engine).parameters()])
    # By norm: where a gradient is almost zero, Adam makes a step of its rounding error's sign.
    assert (weights(engine) - expected).norm() < 1e-3 * moved.norm()


def test_evaluate_gives_what_forward_gives_without_a_graph(make: Make) -> None:
    engine = make()
    m = micro_batches()[0]
    evaluated = call(engine.evaluate, m)
    assert not evaluated.requires_grad
    forward = call(engine.forward, m)
    assert torch.equal(evaluated, forward.detach())
    engine.backward(forward.sum(), last=True)
    engine.step()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_stop_raises_and_leaves_everything_as_it_was(make: Make, poison: float) -> None:
    engine = make(on_nonfinite="stop")
    before = weights(engine)
    accumulate(engine, scale=poison)
    with pytest.raises(NonFiniteError, match="of the policy"):
        engine.step()
    assert torch.equal(weights(engine), before)
    assert engine.num_steps == 0


def test_a_loss_alone_that_is_not_finite_is_found(make: Make) -> None:
    engine = make(on_nonfinite="skip")
    before = weights(engine)
    accumulate_with_constant(engine, float("inf"))
    result = engine.step()
    assert not result.applied
    assert torch.equal(weights(engine), before)


def accumulate_with_constant(engine: TrainingEngine, constant: float) -> None:
    engine.backward(-call(engine.forward, micro_batches()[0]).sum() / 50 + constant, last=True)


def test_a_skipped_step_leaves_no_trace(make: Make) -> None:
    engine, straight = make(on_nonfinite="skip"), make(on_nonfinite="skip")
    for twin in (engine, straight):
        accumulate(twin)
        twin.step()
    accumulate(engine, scale=float("nan"))
    assert not engine.step().applied
    for twin in (engine, straight):
        accumulate(twin)
        assert twin.step().applied
    assert engine.num_steps == straight.num_steps == 2
    assert torch.equal(weights(engine), weights(straight))


def test_too_many_skips_in_a_row_stop(make: Make) -> None:
    engine = make(on_nonfinite="skip", max_consecutive_skips=1)
    accumulate(engine, scale=float("nan"))
    assert not engine.step().applied
    accumulate(engine, scale=float("nan"))
    with pytest.raises(NonFiniteError):
        engine.step()


def test_too_many_skips_in_all_stop_also_after_a_resume(make: Make, tmp_path: Path) -> None:
    engine = make(on_nonfinite="skip", max_skips_per_round=1)
    accumulate(engine, scale=float("nan"))
    assert not engine.step().applied
    accumulate(engine)
    assert engine.step().applied
    engine.save(tmp_path)
    restored = make(on_nonfinite="skip", max_skips_per_round=1)
    restored.load(tmp_path)
    accumulate(restored, scale=float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1, skip 2 of this round: learner.max_skips_per_round = 1"):
        restored.step()


@torch.no_grad()
def test_a_parameter_that_is_not_finite_is_found(make: Make) -> None:
    engine = make()
    engine.require_finite_parameters()
    parameter = list(engine.module.parameters())[-3]
    getattr(parameter, "ds_tensor", parameter).view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match="parameter of the policy"):
        engine.require_finite_parameters()


def test_i24_a_checkpoint_continues_bit_for_bit(make: Make, tmp_path: Path) -> None:
    engine = make()
    accumulate(engine)
    engine.step()
    engine.save(tmp_path)
    restored = make()
    restored.load(tmp_path)
    assert restored.num_steps == 1
    for twin in (engine, restored):
        accumulate(twin)
        twin.step()
    assert torch.equal(weights(engine), weights(restored))


def test_a_missing_checkpoint_is_an_error(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        make().load(tmp_path)


def test_gather_gives_full_shapes_by_name(make: Make) -> None:
    engine = make()
    shapes = engine.parameter_shapes()
    assert {name: tuple(shape) for name, shape in shapes.items()} == {
        name: tuple(p.shape) for name, p in twin_of(engine).named_parameters()
    }
    [name, *_] = [name for name in shapes if "mlp" in name]
    [(found, tensor)] = engine.gather([name]).items()
    assert found == name
    assert torch.equal(tensor, dict(twin_of(engine).named_parameters())[name])


def test_a_measured_gradient_is_gone_and_leaves_no_trace(make: Make) -> None:
    engine = make()
    before = weights(engine)
    accumulate(engine, scale=3.0)
    norm = engine.measure()
    assert engine.num_steps == 0
    assert torch.equal(weights(engine), before)
    accumulate(engine)
    result = engine.step()
    assert norm == pytest.approx(3.0 * result.grad_norm, rel=1e-4)
    twin = make()
    accumulate(twin)
    twin.step()
    moved = weights(twin) - before
    assert (weights(engine) - weights(twin)).norm() < 1e-3 * moved.norm()
