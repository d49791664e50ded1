"""Rewards from Python functions and from a real HTTP server on this machine."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from configs.scoring import HTTPRewardConfig
from protocol.errors import UserError
from protocol.messages import RolloutKey
from reward_service.functions import FunctionReward, HTTPReward, TextBatch, import_function
from reward_service.scoring import RewardError

HERE = "tests.unit.reward_service.test_functions"
SECRET = "token-that-nobody-may-see"


def length_of(*, prompts: list, responses: list, finish_reasons: list, metadata: list) -> list[float]:
    return [len(response) + (reason == "length") for response, reason in zip(responses, finish_reasons, strict=True)]


def tag_of(*, metadata: list[dict], **rest: object) -> list[float]:
    return [float(row["tag"]) for row in metadata]


def raises(**batch: object) -> list[float]:
    raise ZeroDivisionError("no luck")


def one_nan(*, prompts: list, **rest: object) -> list[float]:
    return [math.nan if prompt == "b?" else 0.0 for prompt in prompts]


def too_few(**batch: object) -> list[float]:
    return [1.0]


not_a_function = 3


def batch() -> TextBatch:
    return TextBatch(
        keys=tuple(RolloutKey(0, 7, name, 0) for name in "abc"),
        prompts=("a?", "b?", "c?"),
        responses=("x", "yy", "zzz"),
        finish_reasons=("stop", "length", "stop"),
        metadata=({"tag": "1"}, {"tag": "2"}, {"tag": "3"}),
    )


def test_a_function_scores_the_whole_batch(tmp_path: Path) -> None:
    reward = FunctionReward(name="length", path=f"{HERE}:length_of", incident_dir=tmp_path)
    assert reward.raw_scores(batch()).tolist() == [1.0, 3.0, 3.0]
    reward = FunctionReward(name="tag", path=f"{HERE}:tag_of", incident_dir=tmp_path)
    assert reward.raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("path", ["no_such_module_here:f", f"{HERE}:missing", f"{HERE}:not_a_function"])
def test_a_wrong_path_is_found_at_the_start(path: str) -> None:
    with pytest.raises(UserError, match="reward tone"):
        import_function(path, component="tone")


@pytest.mark.parametrize(
    ("function", "key", "words"),
    [("raises", "r0/i7/a#0", "no luck"), ("one_nan", "r0/i7/b#0", "nan"), ("too_few", "r0/i7/a#0", "3 responses")],
)
def test_a_failing_function_names_itself_and_saves_the_batch(
    function: str, key: str, words: str, tmp_path: Path
) -> None:
    reward = FunctionReward(name="tone", path=f"{HERE}:{function}", incident_dir=tmp_path / "incidents")
    with pytest.raises(RewardError, match="tone") as caught:
        reward.raw_scores(batch())
    assert str(caught.value.key) == key
    assert words in str(caught.value)
    assert caught.value.incident is not None
    record = json.loads(Path(caught.value.incident).read_text())
    assert record["component"] == "tone"
    assert record["key"] == key
    assert record["prompts"] == ["a?", "b?", "c?"]
    assert record["responses"] == ["x", "yy", "zzz"]


class Server:
    """A reward server whose answers a test chooses."""

    def __init__(self, answer: Callable[[int, dict], tuple[int, object]]) -> None:
        self.requests: list[dict] = []
        self.tokens: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.tokens.append(self.headers.get("Authorization"))
                status, content = answer(len(outer.requests), body)
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                """Keep the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(answer: Callable[[int, dict], tuple[int, object]]) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.stop()


def http_reward(url: str, directory: Path, **changes: object) -> HTTPReward:
    return HTTPReward(HTTPRewardConfig(name="tone", url=url, **changes), incident_dir=directory)


def lengths(number: int, body: dict) -> tuple[int, object]:
    return 200, {"scores": [len(response) for response in body["responses"]]}


def test_an_endpoint_scores_the_batch(tmp_path: Path) -> None:
    with serving(lengths) as server:
        assert http_reward(server.url, tmp_path).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert server.requests == [
        {
            "keys": ["r0/i7/a#0", "r0/i7/b#0", "r0/i7/c#0"],
            "prompts": ["a?", "b?", "c?"],
            "responses": ["x", "yy", "zzz"],
            "finish_reasons": ["stop", "length", "stop"],
            "metadata": [{"tag": "1"}, {"tag": "2"}, {"tag": "3"}],
        }
    ]
    assert server.tokens == [None]


def test_server_errors_are_tried_again(tmp_path: Path) -> None:
    with serving(lambda number, body: (503, "busy") if number < 3 else lengths(number, body)) as server:
        assert http_reward(server.url, tmp_path, attempts=3).raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]
    assert len(server.requests) == 3


def test_attempts_are_limited(tmp_path: Path) -> None:
    with serving(lambda number, body: (500, "broken")) as server, pytest.raises(RewardError, match="status 500"):
        http_reward(server.url, tmp_path, attempts=2).raw_scores(batch())
    assert len(server.requests) == 2
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_refusals_are_not_tried_again(tmp_path: Path) -> None:
    with serving(lambda number, body: (422, "bad batch")) as server, pytest.raises(RewardError, match="bad batch"):
        http_reward(server.url, tmp_path).raw_scores(batch())
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"scores": [1.0, 2.0]}, "3 responses"),
        ({"scores": [1.0, None, 2.0]}, "not a sequence of numbers"),
        ('{"scores": [1.0, NaN, 2.0]}', "nan"),
        ({"rewards": [1.0, 2.0, 3.0]}, "not a sequence of numbers"),
        ("<html>", "not JSON"),
    ],
)
def test_a_wrong_answer_is_a_failure(content: object, words: str, tmp_path: Path) -> None:
    with serving(lambda number, body: (200, content)) as server, pytest.raises(RewardError, match=words):
        http_reward(server.url, tmp_path).raw_scores(batch())
    assert len(server.requests) == 1


def test_a_slow_endpoint_is_given_up(tmp_path: Path) -> None:
    release = threading.Event()

    def wait(number: int, body: dict) -> tuple[int, object]:
        release.wait(5)
        return 200, {"scores": [0, 0, 0]}

    with serving(wait) as server:
        with pytest.raises(RewardError, match="ReadTimeout"):
            http_reward(server.url, tmp_path, timeout_s=0.2, attempts=1).raw_scores(batch())
        release.set()


def test_an_endpoint_that_is_not_there(tmp_path: Path) -> None:
    with serving(lengths) as server:
        url = server.url
    with pytest.raises(RewardError, match="ConnectError") as caught:
        http_reward(f"{url}?key={SECRET}", tmp_path, attempts=2).raw_scores(batch())
    assert SECRET not in str(caught.value)


def test_the_token_is_sent_and_seen_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TONE_TOKEN", SECRET)
    with caplog.at_level(logging.DEBUG), serving(lambda number, body: (500, "broken")) as server:
        reward = http_reward(server.url, tmp_path, token_env="TONE_TOKEN", attempts=1)
        with pytest.raises(RewardError) as caught:
            reward.raw_scores(batch())
    assert server.tokens == [f"Bearer {SECRET}"]
    saved = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert SECRET not in str(caught.value) + caplog.text + saved


def test_a_missing_token_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TONE_TOKEN", raising=False)
    with pytest.raises(UserError, match="TONE_TOKEN"):
        http_reward("http://127.0.0.1:1/score", tmp_path, token_env="TONE_TOKEN")
