"""Answers from a language model: the Protocol, and a client for OpenAI-compatible endpoints that expects the worst."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol
from urllib.parse import urlsplit

import httpx
import tenacity

from configs.labels import JudgeConfig
from protocol.errors import UserError
from protocol.tokens import Message
from reward_service.posting import Endpoint, NoAnswer, Reply, may_pass

_PATIENCE = 20
"""Failures in a row that condemn an endpoint: more than the 16 questions that one bad response of nine can spoil."""
_TOO_LONG = ("context_length", "context length", "too long", "too large", "max_model_len")
_NEXT_STEP = {
    401: "set the environment variable that token_env names to a valid token",
    403: "check that the token may use this model",
    404: "check url (it usually ends in /v1) and model; GET {url}/models lists the models that are served",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionFailure:
    """An answer that did not come."""

    reason: str
    """Class of failure, colon, details."""


class Completer(Protocol):
    """Answers questions with a language model."""

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str | CompletionFailure]:
        """Answer greedily.

        Args:
            prompts: Conversations, each to be continued by one answer.
            max_tokens: The longest answer.

        Returns:
            An answer, or why there is none, for each prompt, in their order.

        Raises:
            UserError: If no prompt can be answered before the user changes something.
        """
        ...


class EndpointCompleter:
    """A client of `POST {url}/chat/completions`, temperature 0.

    A try takes `timeout_s` at most, whatever the server does with the connection. Time-outs, lost connections, 408,
    425, 429, 5xx and bodies that are no chat completion are tried again, `attempts` times in all, with growing,
    jittered pauses (or what Retry-After asks for) of `max_pause_s` at most. So a question is settled after
        attempts * timeout_s + (attempts - 1) * max_pause_s
    at the latest. Other statuses are the user's to mend and end the call, except that a single question may be too long
    for the model. When 20 questions in a row (or `concurrency`, if that is more) have used up their tries, those not
    yet asked fail at once.

    Requests go to the configured address alone: redirects are not followed, and proxies are not used for this machine.
    Answers are cut off at 1 MiB. The token is read from the environment and shown nowhere.

    Args:
        config: Address, model, time limit, attempts, concurrency, token.
        first_pause_s: The first pause; each next one is twice as long.
        max_pause_s: The longest pause.

    Raises:
        UserError: If the address is none or holds more than that, or the token is not there or not usable.
        ValueError: If the config has no address.
    """

    def __init__(self, config: JudgeConfig, *, first_pause_s: float = 1.0, max_pause_s: float = 30.0) -> None:
        if config.url is None:
            raise ValueError("a judge without url has no endpoint")
        _refuse_additions(config.url)
        self._config = config
        self._url = config.url.rstrip("/")
        self._where = f"judge {config.model}"
        self._endpoint = Endpoint(self._url, where=self._where, token_env=config.token_env)
        self._where += f" at {self._url}"
        self._pause = tenacity.wait_exponential_jitter(initial=first_pause_s, max=max_pause_s, jitter=first_pause_s)
        self._max_pause_s = max_pause_s

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str | CompletionFailure]:
        """Answer greedily; see the class for retries and limits. Not to be called from a running event loop.

        Raises:
            UserError: If the endpoint refuses: it names the endpoint and the next step.
        """
        return asyncio.run(self._complete(prompts, max_tokens))

    async def _complete(self, prompts: Sequence[Sequence[Message]], max_tokens: int) -> list[str | CompletionFailure]:
        gate = asyncio.Semaphore(self._config.concurrency)
        patience = max(_PATIENCE, self._config.concurrency)
        failed_in_a_row = 0

        async def answer(messages: Sequence[Message]) -> str | CompletionFailure:
            nonlocal failed_in_a_row
            async with gate:
                if failed_in_a_row >= patience:
                    return CompletionFailure(reason="not asked: the endpoint had left all questions before unanswered")
                found = await self._answer(client, self._body(messages, max_tokens))
                failed_in_a_row = failed_in_a_row + 1 if _is_silence(found) else 0
                return found

        async with self._endpoint.client(max_connections=self._config.concurrency) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answer(messages)) for messages in prompts]
            except ExceptionGroup as errors:
                # One refusal ends the call; the others say the same.
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _body(self, messages: Sequence[Message], max_tokens: int) -> bytes:
        # Plain ASCII: a response may hold half a surrogate pair, which UTF-8 cannot say.
        return json.dumps(
            {"model": self._config.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        ).encode("ascii")

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> str | CompletionFailure:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.attempts),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NoAnswer) and error.may_pass),
            reraise=True,
        )
        try:
            return await retrying(self._ask, client, body)
        except NoAnswer as error:
            return CompletionFailure(reason=error.reason)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, NoAnswer) else 0.0
        return min(max(asked, self._pause(state)), self._max_pause_s)

    async def _ask(self, client: httpx.AsyncClient, body: bytes) -> str:
        url = f"{self._url}/chat/completions"
        reply = await self._endpoint.post(client, url, body=body, limit_s=self._config.timeout_s)
        if reply.status != 200:
            self._refuse(reply)
        return _content(reply.data)

    def _refuse(self, reply: Reply) -> NoReturn:
        """Raise what a status other than 200 calls for: try again, give this question up, or call the user."""
        status, said = reply.status, self._endpoint.said(reply)
        # A completion changes nothing at the server, so that these are worth another try too.
        if may_pass(status) or status in (408, 425) or status >= 500:
            raise NoAnswer(f"no answer: status {status}: {said}", may_pass=True, retry_after_s=reply.retry_after_s)
        if status == 413 or (status in (400, 422) and any(sign in said.lower() for sign in _TOO_LONG)):
            raise NoAnswer(f"question too long: status {status}: {said}", may_pass=False)
        if status < 400:
            raise UserError(
                f"status {status}: it answers with a redirect or without content, and redirects are not followed",
                where=self._where,
                next_step="set url to the address that answers itself",
            )
        step = _NEXT_STEP.get(status, "mend what the endpoint complains about").format(url=self._url)
        raise UserError(f"status {status}: {said or 'no message'}", where=self._where, next_step=step)


def _refuse_additions(url: str) -> None:
    """Refuse what would stand between the address and /chat/completions, and may be secret."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise UserError(
            f"the address at {parts.hostname} holds a query or a fragment, which may be secret",
            where="the judge's url",
            next_step="write http://HOST:PORT/v1 or the like; a token goes into the variable that token_env names",
        )


def _is_silence(answer: str | CompletionFailure) -> bool:
    """Tell whether the endpoint failed, and not just on this one question."""
    return isinstance(answer, CompletionFailure) and answer.reason.startswith("no answer:")


def _content(data: bytes) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise NoAnswer("no answer: the body is no chat completion", may_pass=True) from None
    if content is not None and not isinstance(content, str):
        raise NoAnswer("no answer: the content is no text", may_pass=True)
    return content or ""
