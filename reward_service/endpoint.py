"""Rewards from HTTP endpoints: one finite number for each response, or an error that says who failed on what."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import tenacity

from configs.scoring import HTTPRewardConfig
from protocol.messages import FloatArray, RolloutKey
from reward_service.breaker import Breaker
from reward_service.posting import Endpoint, NoAnswer, may_pass
from reward_service.scoring import RewardError, require_scores
from reward_service.text_batch import TextBatch, batch_saved_on_failure, file_name

_Attempt = Mapping[str, object]


class _Failed(Exception):
    """One request that brought no scores, however often it was tried."""

    def __init__(
        self, reason: str, *, key: RolloutKey, keys: Sequence[RolloutKey], body: bytes, attempts: Sequence[_Attempt]
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key
        self.keys = keys
        self.body = body
        self.attempts = attempts
        self.was_left_unanswered = False
        """Whether tries were used up, rather than an answer being no good."""


class HTTPReward:
    """A reward from an HTTP endpoint that takes and returns JSON.

    It posts {"keys", "prompts", "responses", "finish_reasons", "metadata"}, lists of one length of `batch_responses`
    at most, and expects {"scores": [...]} of that length. `concurrency` requests are under way at a time; what is
    asked together depends on the order alone.

    Lost connections, time-outs, 429, 502, 503 and 504 are tried again, `attempts` times in all, after a pause drawn
    from [0, first_pause_s 2^(n-1)] (full jitter), on top of what Retry-After asks for; nothing else is: any other
    status and an answer that is no good would come again. Everything ends within `deadline_s`. After
    `breaker_failures` batches in a row that were left unanswered, the endpoint is not asked for `breaker_cooldown_s`.

    A request that failed is noted in `dead-letters-NAME.jsonl` beside the incidents: its keys, its hash, the reason,
    and when each try began and what came of it.

    Args:
        config: Address, limits, and the environment variable that holds a bearer token.
        incident_dir: Where the batch is kept when the endpoint fails.
        first_pause_s: The bound of the first pause; each next one is twice as long.
        clock: Seconds, for the circuit breaker.

    Raises:
        UserError: If the address may not be asked, or the environment variable is named but not set.
    """

    def __init__(
        self,
        config: HTTPRewardConfig,
        *,
        incident_dir: Path,
        first_pause_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = config.name
        self._config = config
        self._incident_dir = incident_dir
        self._endpoint = Endpoint(config.url, where=f"reward {config.name}", token_env=config.token_env)
        self._pause = tenacity.wait_random_exponential(multiplier=first_pause_s, max=config.timeout_s)
        self._breaker = Breaker(failures=config.breaker_failures, cooldown_s=config.breaker_cooldown_s, clock=clock)

    def raw_scores(self, batch: TextBatch) -> FloatArray:
        """Ask for the scores of a batch. Not to be called from a running event loop.

        Args:
            batch: Prompts and responses.

        Returns:
            [B] raw scores, float32.

        Raises:
            RewardError: If any request is left unanswered, refused, or answered with anything but one finite number
                for each response.
        """
        with batch_saved_on_failure(batch, incident_dir=self._incident_dir):
            try:
                if (wait_s := self._breaker.refusal_s()) > 0:
                    raise self._refusal(batch, wait_s)
                parts = asyncio.run(self._parts(batch))
            except _Failed as failed:
                if failed.was_left_unanswered:
                    self._breaker.failed()
                elif failed.attempts:
                    self._breaker.succeeded()
                self._note(failed)
                what = f"{self._endpoint.host}: {failed.reason}"
                raise RewardError(what, component=self.name, key=failed.key) from None
            self._breaker.succeeded()
            return np.concatenate(parts)

    def _refusal(self, batch: TextBatch, wait_s: float) -> _Failed:
        reason = (
            f"not asked: it left {self._config.breaker_failures} batches in a row unanswered and is asked again in "
            f"{wait_s:.1f} s (breaker_cooldown_s)"
        )
        return _Failed(reason, key=batch.keys[0], keys=batch.keys, body=self._body(batch), attempts=())

    async def _parts(self, batch: TextBatch) -> list[FloatArray]:
        deadline_s = time.monotonic() + self._config.deadline_s
        gate = asyncio.Semaphore(self._config.concurrency)
        size = self._config.batch_responses
        parts = [batch.part(start, start + size) for start in range(0, len(batch.keys), size)]

        async def scored(part: TextBatch) -> FloatArray:
            async with gate:
                return await self._scored(client, part, deadline_s)

        async with self._endpoint.client(max_connections=self._config.concurrency) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(scored(part)) for part in parts]
            except ExceptionGroup as errors:
                # One failure is the batch's; the other requests are given up.
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _scored(self, client: httpx.AsyncClient, part: TextBatch, deadline_s: float) -> FloatArray:
        body = self._body(part)
        attempts: list[_Attempt] = []

        def failed(reason: str, key: RolloutKey | None = None) -> _Failed:
            return _Failed(reason, key=key or part.keys[0], keys=part.keys, body=body, attempts=attempts)

        async def attempt() -> bytes:
            at, came = time.time(), "an answer"
            try:
                return await self._ask(client, body, deadline_s)
            except NoAnswer as error:
                came = error.reason
                raise
            finally:
                attempts.append({"at": at, "seconds": round(time.time() - at, 3), "came": came})

        try:
            data = await self._retrying(deadline_s)(attempt)
        except NoAnswer as error:
            tries = f" ({len(attempts)} tries)" if len(attempts) > 1 else ""
            failure = failed(error.reason + tries)
            failure.was_left_unanswered = error.may_pass
            raise failure from None
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise failed(f"the answer is not JSON: {type(error).__name__}") from None
        try:
            scores = answer.get("scores") if isinstance(answer, dict) else None
            return require_scores(scores, component=self.name, keys=part.keys)
        except RewardError as error:
            raise failed(error.what, error.key) from None

    def _retrying(self, deadline_s: float) -> tenacity.AsyncRetrying:
        def enough(state: tenacity.RetryCallState) -> bool:
            too_late = time.monotonic() + state.upcoming_sleep >= deadline_s
            return too_late or state.attempt_number >= self._config.attempts

        return tenacity.AsyncRetrying(
            stop=enough,
            wait=self._wait_s,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NoAnswer) and error.may_pass),
            reraise=True,
        )

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, NoAnswer) else 0.0
        # On top of what the server asks for, so that those it has sent away do not all come back at once.
        return asked + self._pause(state)

    async def _ask(self, client: httpx.AsyncClient, body: bytes, deadline_s: float) -> bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise NoAnswer(f"not asked within deadline_s = {self._config.deadline_s:g} s", may_pass=True)
        limit_s = min(self._config.timeout_s, left_s)
        reply = await self._endpoint.post(client, self._endpoint.url, body=body, limit_s=limit_s)
        status = reply.status
        if 200 <= status < 300:
            return reply.data
        if 300 <= status < 400:
            raise NoAnswer(f"status {status}: it redirects, and redirects are never followed", may_pass=False)
        asks = f" (Retry-After: {reply.retry_after_s:g} s)" if reply.retry_after_s else ""
        raise NoAnswer(
            f"status {status}: {self._endpoint.said(reply) or 'no message'}{asks}",
            may_pass=may_pass(status),
            retry_after_s=reply.retry_after_s,
        )

    def _body(self, part: TextBatch) -> bytes:
        # Plain ASCII: a response may hold half a surrogate pair, which UTF-8 cannot say.
        return json.dumps({"keys": [str(key) for key in part.keys], **part.arguments()}).encode("ascii")

    def _note(self, failed: _Failed) -> None:
        """Append a request to the dead letters: a line in one write, so that workers do not cut into each other's."""
        letter = {
            "at": time.time(),
            "component": self.name,
            "endpoint": self._endpoint.host,
            "keys": [str(key) for key in failed.keys],
            "request_sha256": hashlib.sha256(failed.body).hexdigest(),
            "reason": failed.reason,
            "attempts": list(failed.attempts),
        }
        self._incident_dir.mkdir(parents=True, exist_ok=True)
        path = self._incident_dir / f"dead-letters-{file_name(self.name)}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(letter) + "\n").encode("ascii"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
