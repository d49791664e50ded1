"""A reward over a real HTTP server on this machine that is slow, flapping, wrong, hostile or not there."""

import asyncio
import email.utils
import hashlib
import json
import logging
import math
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.scoring import HTTPRewardConfig
from protocol.errors import UserError
from reward_service.endpoint import HTTPReward
from reward_service.pinned import ForbiddenAddressError, PinnedTransport, look_up
from reward_service.posting import MAX_ANSWER_BYTES
from reward_service.scoring import RewardError
from tests.json_server import Reply, Script, serving
from tests.reward_batches import batch, lengths

SECRET = "token-that-nobody-may-see"


def reward(url: str, directory: Path, **changes: Any) -> HTTPReward:
    clock = changes.pop("clock", time.monotonic)
    config = HTTPRewardConfig(name="tone", url=url, **{"timeout_s": 20.0, **changes})
    return HTTPReward(config, incident_dir=directory, first_pause_s=0.02, clock=clock)


def failure(made: HTTPReward, size: int = 3) -> RewardError:
    with pytest.raises(RewardError) as caught:
        made.raw_scores(batch(size))
    assert caught.value.component == "tone"
    return caught.value


def letters(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "dead-letters-tone.jsonl").read_text().splitlines()]


def test_an_endpoint_scores_the_batch(tmp_path: Path) -> None:
    with serving(lengths) as server:
        assert reward(server.url, tmp_path).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert server.requests == [
        {
            "keys": ["r2/i7/a#0", "r2/i7/b#0", "r2/i7/c#0"],
            "prompts": ["a?", "b?", "c?"],
            "responses": ["x", "yy", "zzz"],
            "finish_reasons": ["stop", "length", "stop"],
            "metadata": [{"tag": "1"}, {"tag": "2"}, {"tag": "3"}],
        }
    ]
    assert "Authorization" not in server.headers[0]
    assert server.headers[0]["Host"] == server.host
    assert list(tmp_path.iterdir()) == []


def test_large_batches_go_in_parts_a_few_at_a_time_and_come_back_in_order(tmp_path: Path) -> None:
    def uneven(number: int, body: dict[str, Any]) -> Reply:
        reply = lengths(number, body)
        reply.wait_s = 0.2 if body["keys"][0] in ("r2/i7/a#0", "r2/i7/g#0") else 0.02
        return reply

    with serving(uneven) as server:
        made = reward(server.url, tmp_path, batch_responses=3, concurrency=2)
        assert made.raw_scores(batch(11)).tolist() == [float(n) for n in range(1, 12)]
    assert sorted(len(body["keys"]) for body in server.requests) == [2, 3, 3, 3]
    assert server.most_busy == 2


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int, tmp_path: Path) -> None:
    flapping: Script = lambda number, body: Reply(b"busy", status) if number < 3 else lengths(number, body)  # noqa: E731
    with serving(flapping) as server:
        assert reward(server.url, tmp_path, attempts=3).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert len(server.requests) == 3
    with serving(lambda number, body: Reply(b"busy", status)) as server:
        error = failure(reward(server.url, tmp_path, attempts=2))
    assert len(server.requests) == 2
    assert f"{server.host}: status {status}: busy (2 tries)" in str(error)
    assert str(error.key) == "r2/i7/a#0"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 451, 500, 501])
def test_other_statuses_are_final(status: int, tmp_path: Path) -> None:
    with serving(lambda number, body: Reply({"detail": "bad \x1b[31mbatch\n"}, status)) as server:
        error = failure(reward(server.url, tmp_path))
    assert len(server.requests) == 1
    assert f"{server.host}: status {status}: bad ?[31mbatch" in str(error)


@pytest.mark.parametrize(
    ("content", "words", "key"),
    [
        ({"scores": [1.0, 2.0]}, "3 responses", "a"),
        ({"scores": [1.0, 2.0, 3.0, 4.0]}, "3 responses", "a"),
        ({"scores": []}, "3 responses", "a"),
        ({"scores": [[1.0], [2.0], [3.0]]}, "shape", "a"),
        ({"scores": [1.0, None, 2.0]}, "not a sequence of numbers", "a"),
        ({"scores": ["1", "2", "3"]}, "not a sequence of numbers", "a"),
        ({"scores": "123"}, "not a sequence of numbers", "a"),
        ({"scores": 3}, "not a sequence of numbers", "a"),
        ({"scores": {"a": 1}}, "not a sequence of numbers", "a"),
        ({"scores": [1.0, math.nan, 2.0]}, "nan", "b"),
        ({"scores": [1.0, 2.0, -math.inf]}, "-inf", "c"),
        (b'{"scores": [1e999, 1, 1]}', "inf", "a"),
        ({"scores": [1, 10**400, 1]}, "not a sequence of numbers", "a"),
        ({"rewards": [1.0, 2.0, 3.0]}, "not a sequence of numbers", "a"),
        ([1.0, 2.0, 3.0], "not a sequence of numbers", "a"),
        (b"<html>busy</html>", "not JSON", "a"),
        (b"", "not JSON", "a"),
        (b"\xff\xfe\x00garbage", "not JSON", "a"),
        (b"[" * 100_000, "not JSON", "a"),
        (b"9" * 5_000, "not JSON", "a"),
    ],
)
def test_a_wrong_answer_is_a_failure_and_not_asked_for_again(
    content: object, words: str, key: str, tmp_path: Path
) -> None:
    with serving(lambda number, body: Reply(content)) as server:
        error = failure(reward(server.url, tmp_path))
    assert len(server.requests) == 1
    assert words in str(error)
    assert server.host in str(error)
    assert str(error.key) == f"r2/i7/{key}#0"
    assert letters(tmp_path)[0]["keys"] == ["r2/i7/a#0", "r2/i7/b#0", "r2/i7/c#0"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_never_followed(status: int, tmp_path: Path) -> None:
    with serving(lengths) as elsewhere:
        location = {"Location": elsewhere.url}
        with serving(lambda number, body: Reply(status=status, headers=location)) as server:
            error = failure(reward(server.url, tmp_path))
        assert elsewhere.requests == []
    assert len(server.requests) == 1
    assert f"status {status}: it redirects, and redirects are never followed" in str(error)


def test_a_huge_body_is_not_read_to_its_end(tmp_path: Path) -> None:
    with serving(lambda number, body: Reply(b" " * (64 * MAX_ANSWER_BYTES))) as server:
        error = failure(reward(server.url, tmp_path))
    assert "oversized answer: more than 1048576 bytes" in str(error)
    assert len(server.requests) == 1


def test_a_compressed_body_is_not_opened(tmp_path: Path) -> None:
    with serving(lambda number, body: Reply(b"\x1f\x8b" + b"\0" * 50, headers={"Content-Encoding": "gzip"})) as server:
        error = failure(reward(server.url, tmp_path))
    assert "not JSON" in str(error)
    assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "slow",
    [Reply({"scores": [0, 0, 0]}, wait_s=20.0), Reply(b" " * 1000, drip_s=0.05)],
    ids=["silent", "drips"],
)
def test_a_slow_endpoint_is_tried_again_and_then_given_up(slow: Reply, tmp_path: Path) -> None:
    with serving(lambda number, body: slow if number == 1 else lengths(number, body)) as server:
        assert reward(server.url, tmp_path, timeout_s=0.5).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    with serving(lambda number, body: slow) as server:
        error = failure(reward(server.url, tmp_path, timeout_s=0.3, attempts=2))
    assert "no answer: none within 0.3 s (2 tries)" in str(error)
    assert len(server.requests) == 2


def test_a_connection_lost_in_the_middle_of_the_body_is_tried_again(tmp_path: Path) -> None:
    def cut(number: int, body: dict[str, Any]) -> Reply:
        reply = lengths(number, body)
        reply.cut = number < 3
        return reply

    with serving(cut) as server:
        assert reward(server.url, tmp_path).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
        assert len(server.requests) == 3
    with serving(lambda number, body: Reply({"scores": [1, 2, 3]}, cut=True)) as server:
        assert "RemoteProtocolError" in str(failure(reward(server.url, tmp_path)))


def test_headers_that_drip_do_not_hold_it_up(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 1000:
                    connection.send(bytes([letter]))
                    if stop.wait(0.05):
                        return
            except OSError:
                return  # the client has gone, as it should

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
    assert "none within" in str(failure(reward(url, tmp_path, attempts=1, timeout_s=0.5)))
    stop.set()
    thread.join(5)
    listener.close()


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    with serving(lengths) as server:
        url = server.url
    started = time.monotonic()
    error = failure(reward(f"{url}?page={SECRET}", tmp_path, attempts=3))
    assert "no answer: ConnectError" in str(error)
    assert "(3 tries)" in str(error)
    assert time.monotonic() - started < 10
    error = failure(reward("http://no-such-host.invalid/score", tmp_path, attempts=1))
    assert "no-such-host.invalid is unknown" in str(error)
    kept = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in str(error) + kept


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str, tmp_path: Path) -> None:
    # A date has whole seconds, so that one two seconds ahead may be little more than one ahead.
    value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    busy = Reply(b"later", 429, headers={"Retry-After": value})
    with serving(lambda number, body: busy if number == 1 else lengths(number, body)) as server:
        assert reward(server.url, tmp_path).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert server.times[1] - server.times[0] > 0.9


@pytest.mark.parametrize("value", ["1000", "9" * 400])
def test_a_wait_beyond_the_deadline_is_not_begun(value: str, tmp_path: Path) -> None:
    with serving(lambda number, body: Reply(b"later", 503, headers={"Retry-After": value})) as server:
        started = time.monotonic()
        error = failure(reward(server.url, tmp_path, deadline_s=30.0))
        assert time.monotonic() - started < 10
    assert "status 503: later (Retry-After: " in str(error)
    assert len(server.requests) == 1


def test_all_tries_of_all_parts_together_have_a_deadline(tmp_path: Path) -> None:
    with serving(lambda number, body: Reply(b"{}", wait_s=30.0)) as server:
        made = reward(
            server.url, tmp_path, deadline_s=1.0, timeout_s=0.4, attempts=1000, concurrency=1, batch_responses=1
        )
        started = time.monotonic()
        failure(made, 5)
        assert time.monotonic() - started < 10
    assert 2 <= len(server.requests) <= 4


def test_the_pauses_differ_from_try_to_try_and_from_one_to_the_next(tmp_path: Path) -> None:
    pauses: list[float] = []
    with serving(lambda number, body: Reply(b"busy", 503)) as server:
        for _ in range(4):
            made = HTTPReward(
                HTTPRewardConfig(name="tone", url=server.url, attempts=3), incident_dir=tmp_path, first_pause_s=0.2
            )
            failure(made)
            pauses += [b - a for a, b in zip(server.times[-3:], server.times[-2:], strict=False)]
    # Drawn from [0, 0.2] and [0, 0.4]; what a busy machine adds is no draw.
    assert max(pauses) - min(pauses) > 0.02
    assert min(pauses[::2]) < 0.2


def test_the_breaker_spares_an_endpoint_that_leaves_everything_unanswered(tmp_path: Path) -> None:
    now = [0.0]
    with serving(lambda number, body: Reply(b"busy", 503) if number <= 4 else lengths(number, body)) as server:
        made = reward(
            server.url, tmp_path, attempts=2, breaker_failures=2, breaker_cooldown_s=60.0, clock=lambda: now[0]
        )
        failure(made)
        failure(made)
        assert len(server.requests) == 4
        error = failure(made)
        assert len(server.requests) == 4
        assert "not asked: it left 2 batches in a row unanswered and is asked again in 60.0 s" in str(error)
        assert server.host in str(error)
        now[0] = 60.0
        assert made.raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
        assert made.raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert [len(letter["attempts"]) for letter in letters(tmp_path)] == [2, 2, 0]


def test_an_endpoint_that_answers_wrongly_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    with serving(lambda number, body: Reply(b"no", 422) if number % 2 else Reply({"scores": [1]})) as server:
        made = reward(server.url, tmp_path, breaker_failures=1)
        for _ in range(6):
            failure(made)
        assert len(server.requests) == 6


def test_what_failed_is_a_dead_letter_and_an_incident_with_the_batch(tmp_path: Path) -> None:
    def one_bad(number: int, body: dict[str, Any]) -> Reply:
        return Reply(b"busy", 503) if "r2/i7/c#0" in body["keys"] else lengths(number, body)

    before = time.time()
    with serving(one_bad) as server:
        error = failure(reward(server.url, tmp_path, attempts=2, batch_responses=2, concurrency=1), 5)
    assert str(error.key) == "r2/i7/c#0"
    [letter] = letters(tmp_path)
    assert letter["keys"] == ["r2/i7/c#0", "r2/i7/d#0"]
    assert (letter["component"], letter["endpoint"]) == ("tone", server.host)
    sent = json.dumps(server.requests[1]).encode()
    assert letter["request_sha256"] == hashlib.sha256(sent).hexdigest()
    assert letter["reason"] == "status 503: busy (2 tries)"
    assert [attempt["came"] for attempt in letter["attempts"]] == ["status 503: busy"] * 2
    assert before <= letter["attempts"][0]["at"] <= letter["attempts"][1]["at"] <= time.time()
    assert error.incident is not None
    record = json.loads(Path(error.incident).read_text())
    assert (record["kind"], record["policy_version"]) == ("reward_failed", 31)
    assert server.host in record["what"]
    saved = [json.loads(line) for line in (tmp_path / record["data"]["batch"]).read_text().splitlines()]
    assert [row["response"] for row in saved] == ["x", "yy", "zzz", "xxxx", "yyyyy"]
    failure(reward("http://127.0.0.1:9/score", tmp_path, attempts=1))
    assert len(letters(tmp_path)) == 2


def test_half_a_surrogate_pair_reaches_the_endpoint_and_the_files(tmp_path: Path) -> None:
    text = "half \ud83d of a pair, \x00 and \u202e"
    odd = batch(1)
    object.__setattr__(odd, "responses", (text,))
    with serving(lambda number, body: Reply(b"no", 422)) as server:
        with pytest.raises(RewardError) as caught:
            reward(server.url, tmp_path).raw_scores(odd)
        assert server.requests[0]["responses"] == [text]
    saved = Path(str(caught.value.incident)).with_suffix(".jsonl").read_text()
    assert json.loads(saved)["response"] == text


def test_the_token_is_sent_and_seen_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TONE_TOKEN", SECRET)
    caplog.set_level(logging.DEBUG)
    with serving(lambda number, body: Reply(f"bad token {SECRET}".encode(), 401)) as server:
        made = reward(server.url, tmp_path, token_env="TONE_TOKEN")
        error = failure(made)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "bad token [token]" in str(error)
    saved = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in str(error) + repr(made.__dict__) + caplog.text + saved


@pytest.mark.parametrize("value", [None, "", "two words", "caf\u00e9", "line\nbreak"])
def test_a_token_that_will_not_do_is_found_at_the_start(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TONE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("TONE_TOKEN", value)
    with pytest.raises(UserError, match="TONE_TOKEN") as caught:
        reward("http://127.0.0.1:1/score", tmp_path, token_env="TONE_TOKEN")
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@127.0.0.1/", "http://127.0.0.1/?api_key=hunter2", "http://169.254.169.254/hunter2"]
)
def test_an_address_that_may_not_be_asked_is_found_at_the_start(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward tone") as caught:
        reward(url, tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "169.254.43518", "0xa9.254.43518"])
def test_other_spellings_of_a_link_local_address_are_caught_at_the_connection(host: str, tmp_path: Path) -> None:
    error = failure(reward(f"http://{host}/latest/meta-data", tmp_path))
    assert "not asked: " in str(error)
    assert "is 169.254.169.254, a link-local address" in str(error)
    assert len(letters(tmp_path)[0]["attempts"]) == 1


def posted(url: str, *, resolve: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        inner = httpx.AsyncHTTPTransport()
        async with httpx.AsyncClient(transport=PinnedTransport(inner, resolve=resolve), timeout=5) as client:
            return await client.post(url, json={"responses": ["abc"]})

    return asyncio.run(send())


def test_a_name_that_changes_its_mind_is_asked_once_and_the_checked_address_used() -> None:
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    with serving(lengths) as server:
        port = server.host.split(":")[1]
        url = f"http://scores.example:{port}/score"
        assert posted(url, resolve=rebinding).json() == {"scores": [3]}
        assert server.headers[0]["Host"] == f"scores.example:{port}"
        assert asked == ["scores.example"]
        with pytest.raises(ForbiddenAddressError, match=r"scores\.example is 169\.254\.169\.254"):
            posted(url, resolve=rebinding)


def test_one_forbidden_address_among_others_is_enough_to_refuse() -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "fe80::1"]

    with serving(lengths) as server:
        with pytest.raises(ForbiddenAddressError):
            posted(f"http://scores.example:{server.host.split(':')[1]}/", resolve=mixed)
        assert server.requests == []


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    async def both(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]  # the server listens on the second alone

    with serving(lengths) as server:
        assert posted(f"http://scores.example:{server.host.split(':')[1]}/", resolve=both).json() == {"scores": [3]}
    assert "127.0.0.1" in asyncio.run(look_up("localhost", 80))
