"""The learning rate follows its schedule, and only matrices decay."""

import math

import pytest
import torch
from torch import nn

from configs.learner import OptimizerConfig
from learner.training import learning_rate, parameter_groups, squared_norm


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 0.55, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4, 0.1]),
    ],
)
def test_schedules_of_seven_steps(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2, final_fraction=0.1)
    rates = [learning_rate(config, step=step, total_steps=6) for step in range(7)]
    assert rates == pytest.approx(expected)


def test_the_final_rate_is_kept() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", final_fraction=0.25)
    assert learning_rate(config, step=1000, total_steps=10) == pytest.approx(0.5)


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="total number of steps"):
        learning_rate(OptimizerConfig(schedule="linear"), step=0, total_steps=None)


def test_matrices_decay_and_vectors_do_not() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decaying, still = parameter_groups(module, weight_decay=0.1)
    assert [p.ndim for p in decaying["params"]] == [2]
    assert [p.ndim for p in still["params"]] == [1, 1, 1]
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    [only] = parameter_groups(module, weight_decay=0.0)
    assert len(only["params"]) == 4


def test_squared_norm_and_what_is_not_finite() -> None:
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]]).bfloat16()]
    cpu = torch.device("cpu")
    assert squared_norm(tensors, device=cpu).item() == pytest.approx(25.0)
    assert squared_norm([], device=cpu).item() == 0.0
    for bad in (math.nan, math.inf):
        assert not squared_norm([*tensors, torch.tensor([bad])], device=cpu).isfinite()


def test_v21_the_half_life_of_an_average_that_is_not_kept(vectors) -> None:
    """Arithmetic alone, the project has no average of weights: decay^h = 1/2, of InstructGPT's 256,000 episodes."""
    v = vectors["V21_misc"]
    weight, iterations = 1.0, 0
    while weight > 0.5:
        weight, iterations = weight * v["ema_decay"], iterations + 1
    assert iterations == math.ceil(v["halflife_iters"])
    assert v["ema_decay"] ** v["halflife_iters"] == pytest.approx(0.5, abs=1e-8)
    assert v["instructgpt_iters"] == 256_000 / 512
