"""The judge over a real HTTP server on this machine that is slow, wrong, unauthorised, or answers garbage."""

import email.utils
import json
import logging
import socket
import threading
import time
from functools import partial

import pytest

from configs.labels import JudgeConfig
from configs.load import ConfigError, load
from protocol.errors import UserError
from reward_service.posting import MAX_ANSWER_BYTES
from reward_service.preferences.completion import CompletionFailure, EndpointCompleter
from reward_service.preferences.judge import Judge
from reward_service.preferences.labelers import make_labeler
from reward_service.preferences.labeling_protocol import InvalidLabelsError, label_chunks
from reward_service.preferences.labeling_report import summarise_labels
from tests import json_server
from tests.json_server import Reply, Script
from tests.label_tasks import honest, shown, task

SECRET = "token-that-nobody-may-see"
LIMIT_S = 1.0
"""For what is meant to be too slow; everything else has ten seconds."""


serving = partial(json_server.serving, path="/v1")


def says(content: object) -> Reply:
    return Reply(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode())


def works(number: int, body: dict) -> Reply:
    return says(honest(*shown(body["messages"][-1]["content"])))


def error(status: int, message: str = "", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, body=json.dumps({"error": {"message": message}}).encode(), headers=named)


def completer(url: str, **changes: object) -> EndpointCompleter:
    chosen = {"timeout_s": 10.0, "attempts": 3, "concurrency": 4, **changes}
    return EndpointCompleter(JudgeConfig(url=url, model="wise", **chosen), first_pause_s=0.01, max_pause_s=0.3)


def ask(url: str, *, questions: int = 1, **changes: object) -> list[str | CompletionFailure]:
    prompts = [[{"role": "user", "content": f"question {number}"}] for number in range(questions)]
    return completer(url, **changes).complete(prompts, max_tokens=32)


def failure(url: str, **changes: object) -> str:
    (found,) = ask(url, **changes)
    assert isinstance(found, CompletionFailure)
    return found.reason


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def judge(url: str, *, timeout_s: float = 10.0, **changes: object) -> Judge:
    config = JudgeConfig(url=url, model="wise", timeout_s=timeout_s, attempts=2, **changes)
    return Judge(config, complete=EndpointCompleter(config, first_pause_s=0.01, max_pause_s=0.1))


def pairs(count: int) -> list:
    return [task(f"t{number}", f"x {number} 2", f"y {number} 1") for number in range(count)]


def test_a_judge_that_works_labels_pairs_and_rankings() -> None:
    with serving(works) as server:
        config = JudgeConfig(url=server.url + "/", model="wise", max_answer_tokens=77)
        labeler = make_labeler(config, run_seed=0)
        labels = labeler.label([*pairs(5), task("r", "x 1", "y 3", "z 2")], now=time.time)
    assert [label.outcome.winner for label in labels] == ["c0"] * 5 + [None]
    assert labels[5].outcome.ranking == (("c1",), ("c2",), ("c0",))
    assert summarise_labels(labels).flip_rate == 0
    assert len(server.requests) == 5 * 2 + 3 * 2
    path, body = server.paths[0], server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0, 77)
    assert "Authorization" not in server.headers[0]


def test_answers_come_in_the_order_of_the_questions_however_long_each_takes() -> None:
    def uneven(number: int, body: dict) -> Reply:
        reply = says(body["messages"][0]["content"])
        reply.wait_s = 0.15 if number % 3 == 1 else 0.0
        return reply

    with serving(uneven) as server:
        assert ask(server.url, questions=20) == [f"question {number}" for number in range(20)]
    assert 1 < server.most_busy <= 4


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Reply(body=b"{}", wait_s=20.0), "none within 1 s"),
        (Reply(body=b"x" * 1000, drip_s=0.05), "none within 1 s"),
        (error(500, "on fire"), "status 500: on fire"),
        (error(503), "status 503"),
        (error(429, "slow down"), "status 429: slow down"),
        (error(408), "status 408"),
        (Reply(body=b"<html>busy</html>"), "no chat completion"),
        (Reply(body=b"\xff\xfe\x00"), "no chat completion"),
        (Reply(body=b"[" * 100_000), "no chat completion"),
        (Reply(body=b'{"choices": []}'), "no chat completion"),
        (Reply(body=b'"yes"'), "no chat completion"),
        (Reply(body=b""), "no chat completion"),
        (says(["A"]), "the content is no text"),
    ],
    ids=["slow", "drips", "500", "503", "429", "408", "html", "bytes", "deep", "no choice", "text", "nothing", "list"],
)
def test_what_may_pass_is_tried_again_and_then_given_up(bad: Reply, words: str) -> None:
    limit_s = LIMIT_S if bad.wait_s or bad.drip_s else 10.0
    with serving(lambda number, body: bad) as server:
        reason = failure(server.url, timeout_s=limit_s)
        assert reason.startswith("no answer: ")
        assert words in reason
        assert len(server.requests) == 3
    with serving(lambda number, body: bad if number < 3 else says("fine")) as server:
        assert ask(server.url, timeout_s=limit_s) == ["fine"]


def test_headers_that_drip_do_not_hold_it_up() -> None:
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
    started = time.monotonic()
    assert "none within" in failure(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", attempts=1, timeout_s=LIMIT_S)
    assert time.monotonic() - started < 10 * LIMIT_S
    stop.set()
    thread.join(5)
    listener.close()


def test_all_tries_together_have_a_deadline() -> None:
    # 2 tries of 1 s and a pause of 0.3 s at most, whatever the server asks for; the rest is for a busy machine.
    slow_and_demanding = error(429, "later", Retry_After="1000")
    slow_and_demanding.wait_s = 0.2
    with serving(lambda number, body: slow_and_demanding) as server:
        started = time.monotonic()
        assert "status 429: later" in failure(server.url, attempts=2, timeout_s=LIMIT_S)
        assert 0.7 <= time.monotonic() - started < 10


@pytest.mark.parametrize("form", ["seconds", "date", "huge", "nonsense"])
def test_retry_after_is_honoured_up_to_a_cap(form: str) -> None:
    value = {
        "seconds": "1",
        "date": email.utils.formatdate(time.time() + 30, usegmt=True),
        "huge": "9" * 400,
        "nonsense": "soon",
    }[form]
    with serving(lambda number, body: error(429, Retry_After=value) if number == 1 else says("fine")) as server:
        assert ask(server.url) == ["fine"]
        pause = server.times[1] - server.times[0]
    # The cap of these tests is 0.3 s.
    assert pause < 10
    if form != "nonsense":
        assert pause >= 0.29


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
def test_a_refusal_ends_the_call_at_once_and_labels_nothing(status: int) -> None:
    with serving(lambda number, body: error(status, f"no `wise` here, said with {status}")) as server:
        with pytest.raises(UserError, match=f"status {status}: no `wise` here") as caught:
            judge(server.url, concurrency=1).label(pairs(50), now=time.time)
        assert len(server.requests) <= 2
    assert server.url in str(caught.value)
    assert caught.value.next_step


def test_a_wrong_model_name_says_where_the_right_ones_stand() -> None:
    with (
        serving(lambda number, body: error(404, "The model `wise` does not exist.")) as server,
        pytest.raises(UserError) as caught,
    ):
        ask(server.url)
    assert "The model `wise` does not exist" in str(caught.value)
    assert f"{server.url}/models" in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with serving(works) as elsewhere:
        target = f"{elsewhere.url}/chat/completions"
        with (
            serving(lambda number, body: Reply(status=status, headers={"Location": target})) as server,
            pytest.raises(UserError, match="redirects are not followed"),
        ):
            ask(server.url)
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    "bad",
    [
        error(400, "This model's maximum context length is 4096 tokens."),
        Reply(status=400, body=b'{"error": {"message": "no", "code": "context_length_exceeded"}}'),
        error(413),
    ],
    ids=["words", "code", "413"],
)
def test_one_question_that_is_too_long_is_one_failure(bad: Reply) -> None:
    def long_one(number: int, body: dict) -> Reply:
        return bad if body["messages"][0]["content"] == "question 2" else says("fine")

    with serving(long_one) as server:
        found = ask(server.url, questions=5)
        assert len(server.requests) == 5
    assert [one for one in found if one != "fine"] == [found[2]]
    assert isinstance(found[2], CompletionFailure)
    assert found[2].reason.startswith("question too long: status 4")


def test_a_very_long_answer_is_cut_off_and_not_asked_for_again() -> None:
    with serving(lambda number, body: says("y" * (3 * MAX_ANSWER_BYTES))) as server:
        assert failure(server.url) == "oversized answer: more than 1048576 bytes"
        assert len(server.requests) == 1


def test_an_answer_without_content_is_empty() -> None:
    with serving(lambda number, body: says(None)) as server:
        assert ask(server.url) == [""]


def test_connection_refused_is_given_up_and_the_rest_is_not_asked() -> None:
    started = time.monotonic()
    found = ask(f"http://127.0.0.1:{free_port()}/v1", questions=200)
    assert time.monotonic() - started < 30
    reasons = [one.reason for one in found if isinstance(one, CompletionFailure)]
    assert len(reasons) == 200
    assert "no answer: ConnectError" in reasons[0]
    assert sum(reason.startswith("no answer") for reason in reasons) < 20 + 4
    assert reasons[-1].startswith("not asked: ")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda number, body: Reply(wait_s=20.0), "no answer"),
        (lambda number, body: error(500), "no answer"),
        (lambda number, body: Reply(body=b"}{"), "no answer"),
        (lambda number, body: says("I prefer neither, dear user."), "unreadable answer"),
        (lambda number, body: says(""), "empty answer"),
    ],
    ids=["slow", "500", "garbage", "text", "empty"],
)
def test_faults_make_labels_invalid_and_never_ties(script: Script, reason: str) -> None:
    with serving(script) as server:
        limits = {"timeout_s": LIMIT_S if reason == "no answer" else 10.0, "concurrency": 64}
        labels = judge(server.url, max_invalid_fraction=1.0, **limits).label(pairs(3), now=time.time)
        with pytest.raises(InvalidLabelsError, match="3 of 3 labels are invalid") as caught:
            judge(server.url, max_invalid_fraction=0.5, **limits).label(pairs(3), now=time.time)
    assert [label.outcome.verdict for label in labels] == ["invalid"] * 3
    assert summarise_labels(labels).invalid_reasons == {reason: 3}
    assert len(caught.value.labels) == 3


def test_what_was_labelled_before_an_outage_is_kept_and_the_outage_stops_it() -> None:
    recorded: list = []
    with serving(lambda number, body: works(number, body) if number <= 20 else error(500)) as server:
        labeler = judge(server.url, max_invalid_fraction=0.2, concurrency=2)
        chunks = label_chunks(labeler, pairs(50), now=time.time, chunk_tasks=5)
        with pytest.raises(InvalidLabelsError):
            recorded.extend(label for chunk in chunks for label in chunk)
    assert [label.outcome.verdict for label in recorded[:10]] == ["preference"] * 10
    assert {label.outcome.verdict for label in recorded[10:]} == {"invalid"}
    assert len(recorded) == 25


def test_the_token_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", f"{SECRET}\n")
    caplog.set_level(logging.DEBUG)
    shown_to_people = []
    for status in (401, 500):
        with serving(lambda number, body, status=status: error(status, f"bad token {SECRET}")) as server:
            asked = completer(server.url, token_env="JUDGE_TOKEN")
            shown_to_people.append(repr(asked))
            try:
                (found,) = asked.complete([[{"role": "user", "content": "?"}]], max_tokens=8)
                shown_to_people.append(repr(found))
            except UserError as refusal:
                shown_to_people += [str(refusal), repr(refusal.__dict__)]
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert "bad token [token]" in " ".join(shown_to_people)
    assert SECRET not in " ".join(shown_to_people) + caplog.text


@pytest.mark.parametrize("value", [None, "", "two words", "caf\u00e9", "line\nbreak"])
def test_a_token_that_will_not_do_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    else:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(UserError, match="JUDGE_TOKEN") as caught:
        completer("http://127.0.0.1:9/v1", token_env="JUDGE_TOKEN")
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:hunter2@host/v1",
        "http://host/v1?key=hunter2",
        "http://host/v1#hunter2",
    ],
)
def test_an_address_that_may_hold_a_secret_is_refused(url: str) -> None:
    with pytest.raises(UserError) as caught:
        completer(url)
    assert "hunter2" not in str(caught.value)


def test_no_spelling_of_a_link_local_address_is_asked() -> None:
    with pytest.raises(UserError, match="a link-local address"):
        completer("http://169.254.169.254/v1")
    assert failure("http://2852039166/v1") == (
        "not asked: 2852039166 is 169.254.169.254, a link-local address, which no endpoint may be at"
    )


@pytest.mark.parametrize("url", ["http://", "http://h:hunter2/", "http://[hunter2/", "hunter2"])
def test_an_address_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.labeler\.judge\.url|rounds\.labeler\.url") as caught:
        load("quickstart", [f"rounds.labeler={{kind: judge, model: m, url: '{url}'}}"])
    assert "hunter2" not in str(caught.value)


def test_a_proxy_from_the_environment_is_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(works) as proxy, serving(lambda number, body: says("fine")) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert ask(server.url) == ["fine"]
        assert proxy.requests == []


def test_text_that_utf_8_cannot_say_is_sent_as_it_is() -> None:
    with serving(lambda number, body: says("fine")) as server:
        text = "half \ud83d of a pair, \x00 and \u202e"
        assert completer(server.url).complete([[{"role": "user", "content": text}]], max_tokens=8) == ["fine"]
        assert server.requests[0]["messages"][0]["content"] == text


def test_one_response_that_breaks_the_server_spoils_its_own_task_alone() -> None:
    def breaks(number: int, body: dict) -> Reply:
        return error(500) if "poison" in body["messages"][-1]["content"] else works(number, body)

    spoilt = task("r", "poison 1", *(f"x {number}" for number in range(2, 10)))
    with serving(breaks) as server:
        labels = judge(server.url, concurrency=1, max_invalid_fraction=0.5).label([spoilt, *pairs(3)], now=time.time)
    assert [label.outcome.verdict for label in labels] == ["invalid"] + ["preference"] * 3
