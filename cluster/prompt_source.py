"""The prompts of a run: read and encoded once, when they are first needed."""

import logging
from typing import Any

from cluster import fixed_responses, preflight
from cluster.fixed_responses import FixedPool, FixedResponses
from cluster.prompts import PromptStream, encode_prompts
from cluster.rollout_pool import put
from cluster.run_directory import RunDirectory
from configs.data import SourceConfig
from configs.run import RunConfig
from protocol import datasets, tokens
from protocol.messages import Prompt
from protocol.roles import RolloutPool

_LOG = logging.getLogger(__name__)


class Prompts:
    """The prompts of a run, read when they are first needed: the tokenizer comes with the supervised policy."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self._config = config
        self._directory = directory
        self._tokenizer: Any = None
        self._training: list[Prompt] | None = None
        self._held_out: list[Prompt] | None = None
        self._responses: FixedResponses | None = None
        self._stream: PromptStream | None = None

    def training(self) -> list[Prompt]:
        """Return all training prompts."""
        if self._training is None:
            source = self._config.data.prompts
            self._training = _encoded(source, self.tokenizer(), self._config, count=source.count)
        return self._training

    def held_out(self) -> list[Prompt]:
        """Return the prompts of evaluations; none where the configuration names none."""
        if self._held_out is None:
            source, count = self._config.data.eval_prompts, preflight.evaluation_count(self._config)
            self._held_out = [] if source is None else _encoded(source, self.tokenizer(), self._config, count=count)
        return self._held_out

    def responses(self) -> FixedResponses:
        """Return the fixed set of responses."""
        if self._responses is None:
            self._responses = fixed_responses.read(self._config, self.tokenizer())
        return self._responses

    def answered(self, workers: RolloutPool) -> RolloutPool:
        """Say who answers the stream's prompts: the rollout workers, or the fixed set of responses."""
        if self._config.rollout.source == "policy":
            return workers
        return FixedPool(self.responses(), workers, put=put, group_responses=self._config.scoring.group_responses)

    def stream(self) -> PromptStream:
        """Return the stream that the iterations take from."""
        if self._stream is None:
            seed = self._config.run.seed
            if self._config.rollout.source == "data":
                self._stream = PromptStream(self.responses().prompts, seed=seed, where="data.responses")
            else:
                self._stream = PromptStream(self.training(), seed=seed)
        return self._stream

    def rewind(self) -> None:
        """Have the stream begin again, for whoever goes on from a run's beginning."""
        self._stream = None

    def tokenizer(self) -> Any:
        """Return the policy's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = tokens.load_tokenizer(self._directory.policy(0))
        return self._tokenizer


def _encoded(source: SourceConfig, tokenizer: Any, config: RunConfig, *, count: int | None) -> list[Prompt]:
    records = datasets.read_prompts(source.source, split=source.split, seed=config.run.seed, count=count)
    prompts, report = encode_prompts(
        records, tokenizer, max_tokens=config.rollout.max_prompt_tokens, overlong=config.data.overlong_prompts
    )
    if report.num_dropped:
        _LOG.warning("%s: %s", source.source, report.summary())
    return prompts
