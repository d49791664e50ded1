"""Where prompts, demonstrations and preferences come from."""

from typing import Literal

from configs.base import Location, PositiveInt, Section


class SourceConfig(Section):
    """One data set: a file, a hub id, or a Python generator."""

    source: Location
    """A .jsonl or .parquet file (or a directory or glob of them), a hub id, or `package.module:callable`."""
    split: str = "train"
    """The split to read from a hub data set."""
    count: PositiveInt | None = None
    """Read at most so many rows (a Python generator is asked for exactly so many)."""


class DataConfig(Section):
    """The data of a run."""

    prompts: SourceConfig
    eval_prompts: SourceConfig | None = None
    """Held-out prompts for the evaluation before and after; without them no win rate is reported."""
    responses: SourceConfig | None = None
    """A fixed set of prompts with responses to learn from, for `rollout.source = data`: completions, both sides of
    preferences, or all completions of rankings, each one a response. What was preferred plays no part."""
    demonstrations: SourceConfig | None = None
    preferences: SourceConfig | None = None
    pretraining: SourceConfig | None = None
    overlong_prompts: Literal["error", "drop"] = "error"
    """What to do with a prompt longer than `rollout.max_prompt_tokens`; dropped ones are counted and shown."""
