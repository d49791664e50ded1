"""Looks at everything that a run will read, before anything is started or written.

A wrong path, a broken row or a prompt that is too long ends the command within seconds, not after an hour of training.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster import fixed_responses, trained_parts
from cluster.prompts import encode_prompts
from configs.data import SourceConfig
from configs.run import RunConfig
from configs.scoring import FunctionRewardConfig, HTTPRewardConfig, ModelRewardConfig
from protocol import datasets
from protocol.errors import UserError
from protocol.records import text_of
from protocol.tokens import load_tokenizer, tokenizer_from
from reward_service.functions import import_function
from reward_service.posting import Endpoint

_LOG = logging.getLogger(__name__)
_HELD_OUT = "data.eval_prompts"


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
        elif isinstance(reward, ModelRewardConfig) and reward.path != "trained":
            _find_model(reward)
    trained_parts.check(config.models)
    tokenizer = _tokenizer(config)
    data, seed = config.data, config.run.seed
    seen: dict[str, set[str]] = {}
    for name, source, count in (
        ("data.prompts", data.prompts, None if data.prompts is None else data.prompts.count),
        (_HELD_OUT, data.eval_prompts, evaluation_count(config)),
    ):
        if source is not None and datasets.is_local(source.source):
            records = datasets.read_prompts(source.source, split=source.split, seed=seed, count=count)
            prompts, _ = encode_prompts(
                records, tokenizer, max_tokens=config.rollout.max_prompt_tokens, overlong=data.overlong_prompts
            )
            seen[name] = {prompt.text for prompt in prompts}
    if data.responses is not None and datasets.is_local(data.responses.source):
        seen["data.responses"] = {prompt.text for prompt in fixed_responses.read(config, tokenizer).prompts}
    for name, source, read in (
        ("data.demonstrations", data.demonstrations, datasets.read_demonstrations),
        ("data.preferences", data.preferences, datasets.read_preferences),
    ):
        if source is not None and datasets.is_local(source.source):
            seen[name] = {
                text_of(record.prompt)
                for record in read(source.source, split=source.split, seed=seed, count=source.count)
            }
    require_held_out(seen.pop(_HELD_OUT, set()), seen)


def require_held_out(held_out: Collection[str], seen: Mapping[str, Collection[str]]) -> None:
    """Check that the prompts which policies are compared on are not those that they learn from.

    Args:
        held_out: The texts of the evaluation's prompts.
        seen: Where a run learns -> the texts of the prompts there.

    Raises:
        UserError: If more than half of the held-out prompts are among them; fewer are a warning.
    """
    for name, texts in seen.items():
        shared = sorted(set(held_out) & set(texts))
        if not shared:
            continue
        what = f"{len(shared)} of {len(held_out)} prompts of {_HELD_OUT} are in {name} too, such as {shared[0][:80]!r}"
        if 2 * len(shared) > len(held_out):
            raise UserError(
                what,
                where=_HELD_OUT,
                cause="a policy would be judged on what it has learned",
                next_step=f"take them from another split or file than {name}",
            )
        _LOG.warning("%s: the evaluation is not all held out", what)


def evaluation_count(config: RunConfig) -> int:
    """Say how many held-out prompts are read: `rounds.evaluation.num_prompts`, or fewer where the source says so."""
    source, wanted = config.data.eval_prompts, config.rounds.evaluation.num_prompts
    return wanted if source is None or source.count is None else min(source.count, wanted)


def _sources(config: RunConfig) -> Iterator[SourceConfig]:
    data = config.data
    for source in (data.prompts, data.eval_prompts, data.responses, data.demonstrations, data.preferences):
        if source is not None:
            yield source


def _import_functions(config: RunConfig) -> None:
    scoring = config.scoring
    paths = {reward.name: reward.path for reward in scoring.rewards if isinstance(reward, FunctionRewardConfig)}
    if scoring.gold is not None:
        paths |= {"gold": scoring.gold.path, **scoring.gold.components}
    for name, path in paths.items():
        import_function(path, component=name)


def _find_model(reward: ModelRewardConfig) -> None:
    """Find a reward model that is a directory; a hub id is looked up when it is loaded."""
    path = Path(reward.path)
    looks_local = path.is_dir() or path.is_absolute() or reward.path.startswith((".", "~")) or len(path.parts) > 2
    if looks_local and not (path / "config.json").is_file():
        raise UserError(
            f"no reward model in {reward.path}",
            where=f"scoring.rewards, path of {reward.name}",
            cause=f"there is no {path / 'config.json'}",
            next_step="name a directory as save_pretrained writes it, such as RUN/reward_models/v000",
        )


def _tokenizer(config: RunConfig) -> Any:
    """Load the policy's tokenizer, or make the one that supervised fine-tuning will make."""
    scratch, source = config.models.policy.scratch, config.data.demonstrations
    if scratch is None or source is None:
        return load_tokenizer(str(config.models.policy.path))
    records = datasets.read_demonstrations(source.source, split=source.split, seed=config.run.seed, count=source.count)
    return tokenizer_from(records, vocab_size=scratch.vocab_size, context_tokens=scratch.context_tokens)
