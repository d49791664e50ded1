"""Offline learning: a fixed set of responses that is handed out in the place of samples of the policy.

    data.responses -> FixedResponses -> PromptStream (which ones come next) -> FixedPool (in the rollout workers' place)

Each response has a prompt of its own name, so that the stream's order, its epochs and its state in the checkpoint are
those of the responses, and a key names one response alone. Nobody recorded with what probability they were sampled.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.prompts import content_name
from configs.run import RunConfig
from learner.supervised_loop import encode_pair
from protocol.datasets import ReadReport, read_responses
from protocol.errors import UserError
from protocol.messages import NOT_SAMPLED, IntArray, Prompt, Rollout, RolloutRequest
from protocol.records import text_of
from protocol.roles import Finished, Publication, RolloutPool
from protocol.weights import VersionProof

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedResponses:
    """A fixed set of responses, encoded."""

    source: str
    prompts: tuple[Prompt, ...]
    """One for each response: a prompt with several comes as often, each time under another id."""
    response_ids: Mapping[str, IntArray]
    """Prompt id -> [T] its response, with EOS."""
    report: ReadReport
    """Which responses were left out, and why."""

    def answer(self, request: RolloutRequest) -> Rollout:
        """Give the response that a request's prompt stands for.

        Raises:
            ValueError: If it is none of these prompts, or a second response is asked for.
        """
        key = request.key
        if key.prompt_id not in self.response_ids or key.sample != 0:
            raise ValueError(f"{key} is none of the {len(self.prompts)} responses of {self.source}")
        return Rollout(
            key=key,
            prompt=request.prompt,
            response_ids=self.response_ids[key.prompt_id],
            behavior_logprobs=None,
            finish_reason="stop",
            policy_versions=NOT_SAMPLED,
            worker=self.source,
        )


def read(config: RunConfig, tokenizer: Any) -> FixedResponses:
    """Read and encode `data.responses`, prompts by the chat template and responses with their end.

    Responses are named after what they say and what they answer, so that names do not depend on their places; one that
    comes again gets a number behind its name. Those that are too long for a rollout are left out and counted.

    Args:
        config: The run's configuration; it has responses.
        tokenizer: The policy's.

    Raises:
        UserError: If a row is malformed, or fewer are left than an iteration takes.
    """
    source, limits = config.data.responses, config.rollout
    assert source is not None
    rows, report = ReadReport(source=source.source), ReadReport(source=source.source)
    prompts: list[Prompt] = []
    responses: dict[str, IntArray] = {}
    seen: dict[str, int] = {}
    found = read_responses(source.source, split=source.split, seed=config.run.seed, count=source.count, report=rows)
    for where, record in found:
        try:
            prompt_ids, response_ids = encode_pair(tokenizer, record.prompt, record.completion)
        except UserError as error:
            raise error.at(where) from error
        if reason := _why_left_out(len(prompt_ids), len(response_ids), config):
            report.drop(reason, where)
            continue
        report.keep()
        name = content_name([record.prompt, record.completion])
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name}-{seen[name]}"
        text = text_of(record.prompt)
        prompts.append(Prompt(prompt_id=name, token_ids=prompt_ids, text=text, source=record.prompt))
        responses[name] = response_ids
    if len(prompts) < limits.responses_per_iteration:
        raise UserError(
            f"{len(prompts)} responses can be used, and an iteration takes {limits.responses_per_iteration}: "
            f"{report.summary()}",
            where=f"data.responses: {source.source}",
            next_step="give more responses, lower rollout.responses_per_iteration, or raise the limits named here",
        )
    for what, counted in (("rows", rows), ("responses", report)):
        if counted.num_dropped:
            _LOG.warning("%s of %s: %s", what, source.source, counted.summary())
    return FixedResponses(source=source.source, prompts=tuple(prompts), response_ids=responses, report=report)


def _why_left_out(prompt_tokens: int, response_tokens: int, config: RunConfig) -> str | None:
    limits = config.rollout
    if not prompt_tokens:
        return "the prompt has no tokens"
    if prompt_tokens > limits.max_prompt_tokens:
        return f"prompt longer than rollout.max_prompt_tokens = {limits.max_prompt_tokens}"
    if response_tokens > limits.max_response_tokens:
        return f"response longer than rollout.max_response_tokens = {limits.max_response_tokens}, its end included"
    return None


class FixedPool:
    """A fixed set of responses behind the RolloutPool role.

    Args:
        responses: The set.
        workers: Hold the published versions, for evaluation and collection.
        put: Brings responses to where the scoring workers and the learner can read them.
        group_responses: So many are put together: those of one scoring group.
    """

    def __init__(
        self,
        responses: FixedResponses,
        workers: RolloutPool,
        *,
        put: Callable[[Sequence[Rollout]], list[Finished]],
        group_responses: int,
    ) -> None:
        self._responses = responses
        self._workers = workers
        self._put = put
        self._group_responses = group_responses

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        """Yield the response of each request, in their order; they are the same for every policy version."""
        for start in range(0, len(requests), self._group_responses):
            group = requests[start : start + self._group_responses]
            yield from self._put([self._responses.answer(request) for request in group])

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        """Bring the rollout workers to the published version."""
        return self._workers.load(publication)
