"""From requests to sampling parameters, and from engine outputs to rollouts. Pure: no vLLM, no torch.

An engine's context holds `max_prompt_tokens + max_response_tokens`. Behaviour log-probs are those of the distribution
that was really sampled, after temperature, top-k and top-p (algorithms.md 1.1 and 18); a greedy response reports the
log-probs at temperature 1, because its own distribution has no others than 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from actors.errors import InvalidRolloutError
from configs.rollout import RolloutConfig
from protocol.messages import FinishReason, PolicyVersions, Rollout, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How one response is sampled, in the words of any engine."""

    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 keeps all tokens."""
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the seed."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutput:
    """What an engine says about one finished response."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None


def context_tokens(config: RolloutConfig) -> int:
    """Count the tokens that a prompt and its response may have together."""
    return config.max_prompt_tokens + config.max_response_tokens


def plan_sampling(config: RolloutConfig, request: RolloutRequest, *, eos_token_id: int) -> SamplingPlan:
    """Describe how a request's response is sampled.

    Args:
        config: Truncation and decoding of the run.
        request: The seed, the temperature and the length bound of this response.
        eos_token_id: The token that ends a response.

    Returns:
        The sampling parameters; greedy decoding ignores temperature, top-p and top-k.
    """
    greedy = config.decoding == "greedy"
    return SamplingPlan(
        temperature=0.0 if greedy else request.temperature,
        top_p=1.0 if greedy else config.top_p,
        top_k=0 if greedy else config.top_k,
        seed=request.seed,
        max_tokens=request.max_response_tokens,
        stop_token_ids=(eos_token_id,),
    )


def check_requests(config: RolloutConfig, requests: Sequence[RolloutRequest]) -> None:
    """Refuse a batch that an engine could not sample as it was asked to, before any of it is begun.

    Args:
        config: The context's size.
        requests: The whole batch.

    Raises:
        ValueError: If a key comes twice, a prompt or a response bound is empty, or the two exceed the context.
    """
    seen = set()
    for request in requests:
        prompt_tokens, room = len(request.prompt.token_ids), context_tokens(config)
        if request.key in seen:
            raise ValueError(f"{request.key} was asked for twice")
        seen.add(request.key)
        if prompt_tokens == 0 or request.max_response_tokens <= 0:
            raise ValueError(f"{request.key} has an empty prompt or no room for a response")
        if prompt_tokens + request.max_response_tokens > room:
            raise ValueError(
                f"{request.key} needs {prompt_tokens} prompt and up to {request.max_response_tokens} response tokens, "
                f"but the context holds {room} (rollout.max_prompt_tokens + rollout.max_response_tokens)"
            )


def to_rollout(
    request: RolloutRequest, output: EngineOutput, *, eos_token_id: int, policy_version: int, worker: str
) -> Rollout:
    """Turn an engine's output into a rollout, or refuse it.

    Args:
        request: What was asked for.
        output: What the engine sampled; a sampled EOS is its last token and stays in the response.
        eos_token_id: The token that ends a response.
        policy_version: The version that sampled it, first to last token.
        worker: Which worker sampled it.

    Returns:
        The rollout, with int32 tokens and fp32 log-probs.

    Raises:
        InvalidRolloutError: If the output is not a response that can be trained on.
    """
    _check_output(request, output, eos_token_id=eos_token_id)
    return Rollout(
        key=request.key,
        prompt=request.prompt,
        response_ids=np.asarray(output.token_ids, dtype=np.int32),
        behavior_logprobs=np.asarray(output.logprobs, dtype=np.float32),
        finish_reason=cast(FinishReason, output.finish_reason),
        policy_versions=PolicyVersions(first=policy_version, last=policy_version),
        worker=worker,
    )


def _check_output(request: RolloutRequest, output: EngineOutput, *, eos_token_id: int) -> None:
    key, tokens, logprobs = request.key, output.token_ids, output.logprobs
    if output.finish_reason not in ("stop", "length"):
        raise InvalidRolloutError(f"{key} finished for the reason {output.finish_reason!r}, not by EOS or length")
    if not 0 < len(tokens) <= request.max_response_tokens:
        raise InvalidRolloutError(f"{key} has {len(tokens)} tokens; 1 to {request.max_response_tokens} were asked for")
    if len(logprobs) != len(tokens):
        raise InvalidRolloutError(f"{key} has {len(tokens)} tokens but {len(logprobs)} log-probs")
    if not np.isfinite(np.asarray(logprobs, dtype=np.float64)).all():
        worst = next(i for i, value in enumerate(logprobs) if not np.isfinite(value))
        raise InvalidRolloutError(f"{key} has the log-prob {logprobs[worst]} at token {worst} of {len(tokens)}")
    if (output.finish_reason == "stop") != (tokens[-1] == eos_token_id):
        raise InvalidRolloutError(
            f"{key} finished for the reason {output.finish_reason!r} but its last token is {tokens[-1]} "
            f"(EOS is {eos_token_id})"
        )
