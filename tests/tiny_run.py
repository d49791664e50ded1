"""A run that is real in every part and over in well under a minute: the quickstart with everything small."""

from pathlib import Path

from configs.load import load
from configs.run import RunConfig

TINY = (
    "models.policy.scratch.hidden_size=64",
    "models.policy.scratch.num_heads=2",
    "models.policy.scratch.num_kv_heads=1",
    "models.policy.scratch.mlp_size=64",
    "models.policy.scratch.num_layers=2",
    "models.policy.scratch.vocab_size=320",
    "data.prompts.count=64",
    "data.eval_prompts.count=16",
    "data.demonstrations.count=300",
    "data.preferences.count=120",
    "rollout.responses_per_iteration=16",
    "rollout.max_prompt_tokens=60",
    "rollout.max_response_tokens=24",
    "rollout.threads_per_worker=1",
    "scoring.group_responses=4",
    "scoring.calibration_responses=16",
    "learner.threads_per_worker=1",
    "learner.sft.num_steps=30",
    "learner.reward_model.num_epochs=1",
    "algorithm.minibatch_responses=8",
    "rounds.count=1",
    "rounds.overrides={}",
    "rounds.collect.comparisons=0",
    "rounds.iterations=3",
    "rounds.evaluation.num_prompts=16",
    "cluster.checkpoint_period_iterations=2",
)
WITHOUT_WARMUP = "algorithm.critic_warmup_iterations=0"
WITHOUT_CRITIC = {"algorithm.name=dpo", "algorithm.name=rft"}


def tiny_overrides(directory: Path, *overrides: str) -> list[str]:
    """Make the overrides of a tiny run kept under `directory`."""
    warmup = [] if WITHOUT_CRITIC & set(overrides) else [WITHOUT_WARMUP]
    return [*TINY, *warmup, f"run.dir={directory}", "run.name=tiny", *overrides]


def tiny_config(directory: Path, *overrides: str) -> RunConfig:
    """Make the configuration of a tiny run."""
    return load("quickstart", tiny_overrides(directory, *overrides))
