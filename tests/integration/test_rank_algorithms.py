"""A rank with the real engines (DeepSpeed, without Ray): what other algorithms build, learn, keep and resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.rank import Rank
from protocol.messages import ReferenceLogprobs, RewardScores, Rollout, UpdateReport
from tests.learner_batches import scored_batch, single_rank
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_config

CASES: dict[str, tuple[str, ...]] = {
    "awr": ("algorithm.name=awr",),
    "a2c": ("algorithm.name=a2c",),
    "rloo": ("algorithm.name=ppo", "algorithm.advantage=rloo"),
    "ptx": ("algorithm.name=ppo", "algorithm.ptx_coefficient=0.5", "algorithm.ptx_texts=4"),
}
UNGUARDED = "learner.guards={logprob_gap_mean_nats: null, ratio_p999: null, ess_fraction: null}"
"""The batch's behaviour log-probs are those of no engine."""
DATA = "data.pretraining={source: 'examples.quickstart.data:demonstrations', count: 20}"


def groups() -> list[Any]:
    """Two responses to each of eight prompts."""
    rollouts: list[Rollout] = []
    scored = scored_batch(16).rollouts
    for number, item in enumerate(scored):
        first = scored[number - number % 2].rollout
        key = first.key._replace(sample=number % 2)
        rollouts.append(Rollout(**{**_fields(item.rollout), "key": key, "prompt": first.prompt}))
    keys = tuple(rollout.key for rollout in rollouts)
    scores = np.array([item.score for item in scored], dtype=np.float32)
    rewards = RewardScores(keys=keys, scores=scores, components={}, gold={}, busy_s=0.0)
    return [(tuple(rollouts), rewards, ReferenceLogprobs(keys=keys, logprobs=tuple(s.ref_logprobs for s in scored)))]


def _fields(rollout: Rollout) -> dict[str, Any]:
    return {name: getattr(rollout, name) for name in Rollout.__dataclass_fields__}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_learns_keeps_and_resumes(name: str, tmp_path: Path) -> None:
    overrides = [*CASES[name], UNGUARDED, "models.critic.init=policy", *([DATA] if name == "ptx" else [])]
    overrides.append("algorithm.alarm_negative_kl=2")  # the reference finds the responses likelier than the policy does
    config = tiny_config(tmp_path, *overrides)
    policy = tiny_llama(tmp_path / "policy")

    def start() -> Rank:
        rank = Rank(single_rank(), config=config, run_directory=tmp_path / "run")
        rank.start_rl(policy=policy, reward_model=None, iterations=3)
        rank.policy_version = 3  # the version that the batch says it was sampled by
        return rank

    def update(rank: Rank, iteration: int) -> UpdateReport:
        return rank.update(groups(), round=1, iteration=iteration)

    rank = start()
    first = update(rank, 0).metrics
    assert first["policy/grad_norm"] > 0
    assert first["policy/first_minibatch_ratio_gap_max"] < 1e-5
    assert any(metric.startswith("value/") for metric in first) == (name != "rloo")
    assert ("policy/ptx_gradient_ratio" in first) == (name == "ptx")
    assert ("policy/weight_ess_fraction" in first) == (name == "awr")
    kept = tmp_path / "checkpoint"
    kept.mkdir()
    rank.save(kept)
    assert sorted(path.name for path in kept.iterdir() if path.is_dir()) == (
        ["policy"] if name == "rloo" else ["critic", "policy"]
    )
    alarm = tmp_path / "run/incidents/negative_kl-r001-i000001.json"
    assert not alarm.exists()
    second = update(rank, 1)
    alarm.unlink()
    rank.finish_rl()

    resumed = start()
    resumed.load(kept)
    assert update(resumed, 1) == second
    resumed.finish_rl()
    # The second iteration in a row, of which the first was before the checkpoint.
    found = json.loads(alarm.read_text())
    assert found["data"] == {
        "kl_k1_per_sequence": second.metrics["objective/kl_k1_per_sequence"],
        "iterations_in_a_row": 2,
    }
    # Which is just what the alarm is for.
    incident = json.loads((tmp_path / "run/incidents/mismatch-r001-i000000.json").read_text())
    assert incident["kind"] == "mismatch"
    assert incident["data"]["k3"] == pytest.approx(first["sync/k3_at_lag_0"])
