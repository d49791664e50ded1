"""A rank with the real engine (DeepSpeed, without Ray) that learns by choosing: kept, resumed, in the next round."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.rank import Rank
from protocol.errors import BatchRefusedError
from protocol.messages import ReferenceLogprobs, RewardScores, UpdateReport
from tests.learner_batches import single_rank
from tests.selection_batches import sampled
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_config

SAMPLES = ("rollout.responses_per_iteration=24", "rollout.samples_per_prompt=3", "algorithm.minibatch_responses=4")
UNGUARDED = "learner.guards={logprob_gap_mean_nats: null, ratio_p999: null, ess_fraction: null}"
"""The batch's behaviour log-probs are those of no engine."""


def groups(iteration: int, *, round: int = 1, broken: bool = False) -> list[Any]:
    """Three responses to each of eight prompts, in two scoring groups."""
    scored = sampled(8, seed=iteration + 10 * round, round=round, iteration=iteration).rollouts
    found = []
    for part in (scored[:10], scored[10:]):
        keys = tuple(item.rollout.key for item in part)
        scores = np.array([np.nan if broken else item.score for item in part], dtype=np.float32)
        rewards = RewardScores(keys=keys, scores=scores, components={}, gold={}, busy_s=0.0)
        reference = ReferenceLogprobs(keys=keys, logprobs=tuple(item.ref_logprobs for item in part))
        found.append((tuple(item.rollout for item in part), rewards, reference))
    return found


@pytest.mark.parametrize("name", ["dpo", "rft"])
def test_a_rank_learns_keeps_and_resumes(name: str, tmp_path: Path) -> None:
    memory = ["algorithm.memory_responses=3"] if name == "rft" else []
    config = tiny_config(tmp_path, f"algorithm.name={name}", *SAMPLES, *memory, UNGUARDED)
    policy = tiny_llama(tmp_path / "policy")

    def start() -> Rank:
        rank = Rank(single_rank(), config=config, run_directory=tmp_path / "run")
        rank.start_rl(policy=policy, reward_model=None, iterations=3)
        rank.policy_version = 3  # the version that the batch says it was sampled by
        return rank

    def update(rank: Rank, iteration: int, *, round: int = 1) -> UpdateReport:
        return rank.update(groups(iteration, round=round), round=round, iteration=iteration)

    rank = start()
    first = update(rank, 0)
    # 8 pairs, two to a step; 8 chosen responses, four to a step.
    assert first.num_steps == (4 if name == "dpo" else 2)
    assert first.metrics["policy/grad_norm"] > 0
    assert not [metric for metric in first.metrics if metric.startswith("value/")]
    shown = rank.samples([groups(0)[0][0][0].key])
    assert shown[0].reward == shown[0].score  # there is no KL in the reward
    rank.write_rollouts(tmp_path / "rollouts.parquet")
    kept = tmp_path / "checkpoint"
    kept.mkdir()
    rank.save(kept)
    names = {path.name for path in kept.iterdir()}
    assert names == {"policy", "learner.json"} | ({"memory.npz"} if name == "rft" else set())
    second = update(rank, 1)
    rank.finish_rl()

    resumed = start()
    resumed.load(kept)
    assert update(resumed, 1) == second
    resumed.finish_rl()

    following = start()
    following.carry_over(kept)
    of_second_round = update(following, 0, round=2).metrics
    if name == "rft":
        assert (second.metrics["rft/recalled_responses"], second.metrics["rft/memory_responses"]) == (3, 16)
        assert (of_second_round["rft/recalled_responses"], of_second_round["rft/memory_responses"]) == (3, 16)
    with pytest.raises(BatchRefusedError, match="score is not finite"):
        following.update(groups(1, round=2, broken=True), round=2, iteration=1)
    following.finish_rl()
    incident = json.loads((tmp_path / "run/incidents/nonfinite-r002-i000001.json").read_text())
    assert incident["data"]["critic_steps"] == 0
