"""Looks at everything that a run will read, before anything is started or written.

A wrong path, a broken row or a prompt that is too long ends the command within seconds, not after an hour of training.
"""

from collections.abc import Iterator
from typing import Any

from cluster.prompts import encode_prompts
from configs.data import SourceConfig
from configs.run import RunConfig
from configs.scoring import FunctionRewardConfig, HTTPRewardConfig
from protocol import datasets
from protocol.tokens import load_tokenizer, tokenizer_from
from reward_service.functions import import_function
from reward_service.posting import Endpoint


def check(config: RunConfig) -> None:
    """Read all local data, encode all prompts, import all functions and find all tokens that the configuration names.

    Hub data sets are opened and their first row is read; they are checked in full when they are used.

    Args:
        config: The run's configuration.

    Raises:
        UserError: At the first thing that is wrong.
    """
    for source in _sources(config):
        datasets.peek(source.source, split=source.split)
    _import_functions(config)
    for reward in config.scoring.rewards:
        if isinstance(reward, HTTPRewardConfig):
            Endpoint(reward.url, where=f"reward {reward.name}", token_env=reward.token_env)
    tokenizer = _tokenizer(config)
    for prompts, count in (
        (config.data.prompts, config.data.prompts.count),
        (config.data.eval_prompts, evaluation_count(config)),
    ):
        if prompts is not None and datasets.is_local(prompts.source):
            records = datasets.read_prompts(prompts.source, split=prompts.split, seed=config.run.seed, count=count)
            encode_prompts(
                records, tokenizer, max_tokens=config.rollout.max_prompt_tokens, overlong=config.data.overlong_prompts
            )
    preferences = config.data.preferences
    if preferences is not None and datasets.is_local(preferences.source):
        for _ in datasets.read_preferences(
            preferences.source, split=preferences.split, seed=config.run.seed, count=preferences.count
        ):
            continue


def evaluation_count(config: RunConfig) -> int:
    """Say how many held-out prompts are read: `rounds.evaluation.num_prompts`, or fewer where the source says so."""
    source, wanted = config.data.eval_prompts, config.rounds.evaluation.num_prompts
    return wanted if source is None or source.count is None else min(source.count, wanted)


def _sources(config: RunConfig) -> Iterator[SourceConfig]:
    data = config.data
    for source in (data.prompts, data.eval_prompts, data.demonstrations, data.preferences):
        if source is not None:
            yield source


def _import_functions(config: RunConfig) -> None:
    scoring = config.scoring
    paths = {reward.name: reward.path for reward in scoring.rewards if isinstance(reward, FunctionRewardConfig)}
    if scoring.gold is not None:
        paths |= {"gold": scoring.gold.path, **scoring.gold.components}
    for name, path in paths.items():
        import_function(path, component=name)


def _tokenizer(config: RunConfig) -> Any:
    """Load the policy's tokenizer, or make the one that supervised fine-tuning will make."""
    scratch, source = config.models.policy.scratch, config.data.demonstrations
    if scratch is None or source is None:
        return load_tokenizer(str(config.models.policy.path))
    records = datasets.read_demonstrations(source.source, split=source.split, seed=config.run.seed, count=source.count)
    return tokenizer_from(records, vocab_size=scratch.vocab_size, context_tokens=scratch.context_tokens)
