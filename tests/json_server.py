"""A server on this machine that takes and sends JSON, whose answers a test chooses."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends back."""

    body: Any = b""
    """Bytes, or what is sent as JSON."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    drip_s: float = 0.0
    """Pause after each byte."""
    cut: bool = False
    """Close the connection in the middle of the body."""

    @property
    def data(self) -> bytes:
        """The body."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


Script = Callable[[int, dict[str, Any]], Reply]
"""(number of the request, from 1; its body) -> what to send."""


class Server:
    """An endpoint that keeps what it was asked.

    Args:
        script: Says what to send.
        path: Of its address.
    """

    def __init__(self, script: Script, *, path: str) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.busy = 0
        self.most_busy = 0
        self.stopped = threading.Event()
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.paths.append(self.path)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    number = len(outer.requests)
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                try:
                    self.send(script(number, body))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has had enough, which is what some tests are about
                finally:
                    with lock:
                        outer.busy -= 1

            def send(self, reply: Reply) -> None:
                outer.stopped.wait(reply.wait_s)
                data = reply.data
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if reply.cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif reply.drip_s:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        if outer.stopped.wait(reply.drip_s):
                            return
                else:
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                """Keep the test's output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}{path}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(script: Script, *, path: str = "/score") -> Iterator[Server]:
    """Serve for as long as the block runs."""
    server = Server(script, path=path)
    try:
        yield server
    finally:
        server.stop()
