"""What each rank process of test_selection_ranks does: DPO and RFT under DeepSpeed, on the same data as any rank."""

from pathlib import Path
from typing import Any

import torch

from configs.learner import LearnerConfig, OptimizerConfig
from configs.selection import DPOConfig, RFTConfig
from learner.engine import DeepSpeedEngine
from learner.experience import PassSettings
from learner.selection_update import SelectionSettings, SelectionUpdater
from learner.training import RankContext, TrainingEngine
from tests.learner_batches import tiny_policy
from tests.rank_processes import run_rank
from tests.selection_batches import sampled, with_scores

HIDDEN = 128
"""Wide enough that ZeRO 3 really shards: smaller matrices stay whole on every rank."""
RATE = OptimizerConfig(learning_rate=3e-4)
PASSES = PassSettings(temperature=0.8, token_budget=70, layout="sorted", pad_id=0)
ALGORITHMS = {
    # Five pairs, three to a step at most: ranks get a different number of them, and some micro-batches are empty.
    "dpo": DPOConfig(minibatch_responses=6, num_epochs=2, dpo_beta=0.3),
    "rft": RFTConfig(minibatch_responses=5, num_epochs=2, memory_responses=4),
}
STAGES = (0, 2, 3)


def updates(policy: TrainingEngine, name: str) -> dict[str, Any]:
    """Learn from three batches; in each, one of six prompts ties."""
    settings = SelectionSettings(algorithm=ALGORITHMS[name], passes=PASSES, run_seed=5)
    updater = SelectionUpdater(policy=policy, settings=settings)
    metrics = []
    for iteration in range(3):
        batch = sampled(seed=iteration, iteration=iteration)
        scores = [scored.score for scored in batch.rollouts]
        scores[6:9] = [1.0] * 3
        metrics.append(dict(updater.update(with_scores(batch, scores)).metrics))
    found = policy.gather(list(policy.parameter_shapes()))
    return {"metrics": metrics, "weights": torch.cat([tensor.flatten().float().clone() for tensor in found.values()])}


def work(context: RankContext, directory: Path) -> dict[tuple[str, int], Any]:
    """Do everything."""
    findings: dict[tuple[str, int], Any] = {}
    for name in ALGORITHMS:
        for stage in STAGES:
            config = LearnerConfig(zero_stage=stage)
            policy = DeepSpeedEngine(
                tiny_policy(hidden=HIDDEN), name="policy", optimizer=RATE, settings=config, context=context
            )
            findings[name, stage] = updates(policy, name)
            policy.close()
    return findings


if __name__ == "__main__":
    run_rank(work)
