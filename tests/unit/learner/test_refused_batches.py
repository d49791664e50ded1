"""Whatever in a batch is not finite or not to be trusted: no step is made of it, and it can be replayed."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import PPOConfig
from configs.kl import KLControllerConfig
from configs.learner import BatchGuardsConfig, LearnerConfig, OptimizerConfig
from learner.estimates import estimate
from learner.experience import Opinions, PassSettings, flatten
from learner.records import read_batch, write_batch
from learner.update import Updater, UpdateSettings
from protocol.errors import NonFiniteError, UntrustedBatchError
from protocol.messages import ScoredBatch, ScoredRollout
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import PlainEngine

ALGORITHM = PPOConfig(minibatch_responses=4, num_epochs=2, kl_controller=KLControllerConfig(kind="adaptive"))
PASSES = PassSettings(temperature=1.0, token_budget=256, layout="sorted", pad_id=0)


def make(*, guards: BatchGuardsConfig | None = None, run_seed: int = 7, **settings: Any) -> Updater:
    config = LearnerConfig(**settings)
    rate = OptimizerConfig(learning_rate=1e-3)
    return Updater(
        policy=PlainEngine(tiny_policy(), optimizer=rate, settings=config, name="policy"),
        critic=PlainEngine(tiny_critic(), optimizer=rate, settings=config, name="critic"),
        settings=UpdateSettings(
            algorithm=ALGORITHM, passes=PASSES, max_response_tokens=24, run_seed=run_seed, guards=guards
        ),
    )


def everything(updater: Updater) -> list[Tensor]:
    """Copy all that an update changes: weights, optimizer state, step counters and the KL controller's coefficient."""
    found = [torch.tensor(updater.kl_beta)]
    for engine in (updater.policy, updater.critic):
        found += [p.detach().clone() for p in engine.module.parameters()]
        found += [t.clone() for state in engine._adamw.state.values() for t in state.values()]
        found.append(torch.tensor(engine.num_steps))
    return found


def unchanged(updater: Updater, before: list[Tensor]) -> bool:
    after = everything(updater)
    return len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def poisoned(batch: ScoredBatch, place: int, change: Callable[[ScoredRollout], ScoredRollout]) -> ScoredBatch:
    rollouts = list(batch.rollouts)
    rollouts[place] = change(rollouts[place])
    return replace(batch, rollouts=tuple(rollouts))


def score(value: float) -> Callable[[ScoredRollout], ScoredRollout]:
    return lambda scored: replace(scored, score=value)


def reference(value: float) -> Callable[[ScoredRollout], ScoredRollout]:
    return lambda scored: replace(scored, ref_logprobs=np.full_like(scored.ref_logprobs, value))


def behaviour(value: float) -> Callable[[ScoredRollout], ScoredRollout]:
    return lambda scored: replace(
        scored,
        rollout=replace(scored.rollout, behavior_logprobs=np.full_like(scored.ref_logprobs, value)),
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (score(math.nan), "score is not finite at rollout r1/i1/p0004#0"),
        (score(math.inf), "score is not finite at rollout r1/i1/p0004#0"),
        (reference(-math.inf), "reference log-prob is not finite at token 0 of rollout r1/i1/p0004#0"),
        (behaviour(math.nan), "behaviour log-prob is not finite at token 0 of rollout r1/i1/p0004#0"),
        # Finite by themselves: the penalty overflows, or the square of the advantage does.
        (reference(-3e38), "reward is not finite at rollout r1/i1/p0004#0"),
        (score(1e25), "variance of the advantages is not finite at token"),
    ],
    ids=["score-nan", "score-inf", "reference", "behaviour", "reward", "advantage-variance"],
)
def test_a_batch_that_is_not_finite_changes_nothing(change: Any, what: str) -> None:
    updater = make(on_nonfinite="skip")  # what is wrong before the first step is no step to be skipped
    updater.update(scored_batch())
    before = everything(updater)
    if "reward" in what:
        updater.settings = replace(
            updater.settings, algorithm=ALGORITHM.model_copy(update={"kl_beta": 10.0, "gae_lambda": 0.0})
        )
        updater.controller.beta = 10.0
        before[0] = torch.tensor(10.0)
    with pytest.raises(NonFiniteError) as error:
        updater.update(poisoned(scored_batch(iteration=1), 4, change))
    assert what in str(error.value)
    assert unchanged(updater, before)


@pytest.mark.parametrize(("values", "what"), [((3e38, -3e38), "advantage"), ((-3e38, 3e38), "advantage")])
def test_advantages_that_overflow_are_found(values: tuple[float, float], what: str) -> None:
    responses = flatten(scored_batch(), device=torch.device("cpu"))
    old = responses.behavior_logprobs
    alternating = torch.where(torch.arange(len(old)) % 2 == 0, *values)
    opinions = Opinions(old_logprobs=old, entropies=old, values=alternating, final_values=torch.zeros(12))
    with pytest.raises(NonFiniteError, match=rf"^{what} is not finite at token \d+ of rollout r1/i0/p00"):
        estimate(responses, opinions, algorithm=ALGORITHM, kl_beta=0.1)


@pytest.mark.parametrize("network", ["policy", "critic"])
def test_a_parameter_that_is_not_finite_after_the_last_step_ends_the_update(network: str) -> None:
    """A gradient may be finite and its step may not: here the last step leaves one infinite weight behind."""
    updater = make(on_nonfinite="skip")
    engine: Any = getattr(updater, network)
    step = engine.step

    def breaking() -> Any:
        result = step()
        if engine.num_steps == 6:
            with torch.no_grad():
                list(engine.module.parameters())[-1].view(-1)[0] = math.inf
        return result

    engine.step = breaking
    with pytest.raises(NonFiniteError, match=f"parameter of the {network} is not finite at the end of step 5"):
        updater.update(scored_batch())


def test_a_batch_of_another_policy_changes_nothing() -> None:
    """The test batches are near uniform, which this policy is not: exactly what stale weights look like."""
    updater = make(guards=BatchGuardsConfig())
    before = everything(updater)
    with pytest.raises(UntrustedBatchError, match="sync/logprob_gap_mean = "):
        updater.update(scored_batch())
    assert unchanged(updater, before)


def test_skipped_steps_are_counted_and_bounded_over_the_round() -> None:
    updater = make(on_nonfinite="skip", max_consecutive_skips=1, max_skips_per_round=2)
    poison_backward(updater.policy, every=2)
    report = updater.update(scored_batch(8))  # four steps, of which the second and the fourth are skipped
    assert report.metrics["policy/skipped_steps"] == 2.0
    assert report.metrics["value/skipped_steps"] == 0.0
    assert (report.num_steps, report.num_skipped_steps) == (2, 2)
    with pytest.raises(NonFiniteError, match=r"skip 3 of this round: learner.max_skips_per_round = 2"):
        updater.update(scored_batch(8, iteration=1))


def poison_backward(engine: Any, *, every: int) -> None:
    """Make the loss of every n-th step NaN, and with it the gradient."""
    backward, step, attempts = engine.backward, engine.step, [1]

    def poisoned_backward(loss: Tensor, *, last: bool) -> None:
        backward(loss * (math.nan if attempts[0] % every == 0 else 1.0), last=last)

    def counted_step() -> Any:
        attempts[0] += 1
        return step()

    engine.backward, engine.step = poisoned_backward, counted_step


def test_a_kept_batch_is_read_back_whole_and_replayed(tmp_path: Path) -> None:
    updater, batch = make(), scored_batch(iteration=2)
    report = updater.update(batch)
    path = tmp_path / "batch.parquet"
    computed = {name: [part.tolist() for part in parts] for name, parts in updater.computed.items()}
    write_batch(
        path,
        batch,
        decode=lambda token_ids: str(token_ids.tolist()),
        kl_nats={},
        computed=computed,
        settings={"run_seed": 7, "kl_beta": 0.05},
    )
    batch_again, settings, computed_again = read_batch(path)
    for ours, theirs in zip(batch_again.rollouts, batch.rollouts, strict=True):
        assert (ours.score, ours.components, ours.rollout.key) == (theirs.score, theirs.components, theirs.rollout.key)
        assert ours.rollout.policy_versions == theirs.rollout.policy_versions
        assert np.array_equal(ours.ref_logprobs, theirs.ref_logprobs)
        assert ours.ref_logprobs.dtype == ours.rollout.behavior_logprobs.dtype == np.float32
    assert set(computed_again) == {"old_logprobs", "values", "advantages", "returns"}
    assert computed_again == json.loads(json.dumps(computed))
    replayed = make(run_seed=int(settings["run_seed"]))
    assert replayed.kl_beta == settings["kl_beta"]
    assert replayed.update(batch_again) == report
    assert unchanged(replayed, everything(updater))


def test_a_replayed_bad_batch_is_bad_again(tmp_path: Path) -> None:
    bad = poisoned(scored_batch(), 4, score(math.nan))
    write_batch(tmp_path / "bad.parquet", bad, decode=lambda token_ids: "", kl_nats={})
    with pytest.raises(NonFiniteError, match="score is not finite at rollout r1/i0/p0004#0"):
        make().update(read_batch(tmp_path / "bad.parquet").batch)
