"""Answers from a language model: the Protocol, and a client for OpenAI-compatible endpoints that expects the worst."""

import asyncio
import email.utils
import ipaddress
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import tenacity

from configs.labels import JudgeConfig
from protocol.errors import UserError
from protocol.tokens import Message

MAX_ANSWER_BYTES = 1 << 20
_PATIENCE = 20
"""Failures in a row that condemn an endpoint: more than the 16 questions that one bad response of nine can spoil."""
_TOO_LONG = ("context_length", "context length", "too long", "too large", "max_model_len")
_NEXT_STEP = {
    401: "set the environment variable that token_env names to a valid token",
    403: "check that the token may use this model",
    404: "check url (it usually ends in /v1) and model; GET {url}/models lists the models that are served",
}

logger = logging.getLogger(__name__)


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


class _NoAnswer(Exception):
    """Say why one try brought no answer, whether another may, and how long the server asks to wait."""

    def __init__(self, reason: str, *, may_pass: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


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
        address = _address(config.url)
        self._config = config
        self._url = config.url.rstrip("/")
        self._where = f"judge {config.model} at {self._url}"
        self._token = _read_token(config, where=self._where)
        self._is_local = _is_local(address.host)
        self._pause = tenacity.wait_exponential_jitter(initial=first_pause_s, max=max_pause_s, jitter=first_pause_s)
        self._max_pause_s = max_pause_s
        if self._token and address.scheme == "http" and not self._is_local:
            logger.warning("%s: the token goes over the network in the clear; use https", self._where)

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

        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answer(messages)) for messages in prompts]
            except ExceptionGroup as errors:
                # One refusal ends the call; the others say the same.
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _client(self) -> httpx.AsyncClient:
        # Nothing is decompressed, so that a small body cannot become a large one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return httpx.AsyncClient(
            headers=headers,
            timeout=self._config.timeout_s,
            follow_redirects=False,
            trust_env=not self._is_local,
            limits=httpx.Limits(max_connections=self._config.concurrency),
        )

    def _body(self, messages: Sequence[Message], max_tokens: int) -> bytes:
        # Plain ASCII: a response may hold half a surrogate pair, which UTF-8 cannot say.
        return json.dumps(
            {"model": self._config.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
        ).encode("ascii")

    async def _answer(self, client: httpx.AsyncClient, body: bytes) -> str | CompletionFailure:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.attempts),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _NoAnswer) and error.may_pass),
            reraise=True,
        )
        try:
            return await retrying(self._ask, client, body)
        except _NoAnswer as error:
            return CompletionFailure(reason=error.reason)

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, _NoAnswer) else 0.0
        return min(max(asked, self._pause(state)), self._max_pause_s)

    async def _ask(self, client: httpx.AsyncClient, body: bytes) -> str:
        limit_s = self._config.timeout_s
        try:
            async with (
                asyncio.timeout(limit_s),
                client.stream("POST", f"{self._url}/chat/completions", content=body) as response,
            ):
                if response.status_code != 200:
                    await self._refuse(response)
                data = await _read_body(response)
        except TimeoutError:
            raise _NoAnswer(f"no answer: none within {limit_s:g} s", may_pass=True) from None
        except httpx.TransportError as error:
            kind = type(error).__name__
            raise _NoAnswer(f"no answer: {kind}: {self._clean(str(error))}", may_pass=True) from None
        if len(data) > MAX_ANSWER_BYTES:
            raise _NoAnswer(f"oversized answer: more than {MAX_ANSWER_BYTES} bytes", may_pass=False)
        return _content(data)

    async def _refuse(self, response: httpx.Response) -> None:
        """Raise what a status other than 200 calls for: try again, give this question up, or call the user."""
        status = response.status_code
        said = self._clean(_message(await _read_body(response)))
        if status in (408, 425, 429) or status >= 500:
            raise _NoAnswer(
                f"no answer: status {status}: {said}", may_pass=True, retry_after_s=_retry_after_s(response)
            )
        if status == 413 or (status in (400, 422) and any(sign in said.lower() for sign in _TOO_LONG)):
            raise _NoAnswer(f"question too long: status {status}: {said}", may_pass=False)
        if status < 400:
            raise UserError(
                f"status {status}: it answers with a redirect or without content, and redirects are not followed",
                where=self._where,
                next_step="set url to the address that answers itself",
            )
        step = _NEXT_STEP.get(status, "mend what the endpoint complains about").format(url=self._url)
        raise UserError(f"status {status}: {said or 'no message'}", where=self._where, next_step=step)

    def _clean(self, text: str) -> str:
        """Shorten what a server said; some servers quote the token they were sent."""
        if self._token:
            text = text.replace(self._token, "[token]")
        text = " ".join(text.split())[:200]
        return "".join(letter if letter.isprintable() else "?" for letter in text)


def _address(url: str) -> httpx.URL:
    step = "write http://HOST:PORT/v1 or the like; a token goes into the environment variable that token_env names"
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        # The error may quote a part of the address that was meant as a password.
        raise UserError("it cannot be read as an address", where="the judge's url", next_step=step) from None
    if not address.host:
        raise UserError("the address names no host", where="the judge's url", next_step=step)
    if address.userinfo or address.query or address.fragment:
        what = f"the address at {address.host} holds a user, a query or a fragment, which may be secret"
        raise UserError(what, where="the judge's url", next_step=step)
    return address


def _is_silence(answer: str | CompletionFailure) -> bool:
    """Tell whether the endpoint failed, and not just on this one question."""
    return isinstance(answer, CompletionFailure) and answer.reason.startswith("no answer:")


def _read_token(config: JudgeConfig, *, where: str) -> str | None:
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    # Checked here, because the error of a library would quote the header.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        state = "holds no usable token" if token else "is not set"
        raise UserError(
            f"the environment variable {config.token_env} {state}",
            where=where,
            next_step=f"export {config.token_env}=... before starting",
        )
    return token


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _read_body(response: httpx.Response) -> bytes:
    """Read a body, but stop once it is larger than an answer may be."""
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            break
    return bytes(data)


def _content(data: bytes) -> str:
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _NoAnswer("no answer: the body is no chat completion", may_pass=True) from None
    if content is not None and not isinstance(content, str):
        raise _NoAnswer("no answer: the content is no text", may_pass=True)
    return content or ""


def _message(data: bytes) -> str:
    """Find what an error body says, in OpenAI's form or in any other."""
    text = data.decode("utf-8", "replace")
    try:
        body: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return " ".join(str(error[name]) for name in ("message", "detail", "code") if error.get(name))
    return str(error)


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
