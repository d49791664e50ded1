"""Serves the labeling page: one process, on this machine alone unless the user says otherwise in so many words."""

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from configs.labels import PeopleConfig
from protocol.errors import UserError
from reward_service.labeling.app import Site, make_app
from reward_service.labeling.guard import hosts_for
from reward_service.labeling.people import invite
from reward_service.labeling.security import SecretFile
from reward_service.preferences.store import PreferenceStore

__all__ = ["invite", "serve", "settings", "site_at"]

_SQLITE = "sqlite"
_BACKLOG = 512


def serve(
    store_url: str,
    *,
    config: PeopleConfig,
    run_name: str,
    host: str = "127.0.0.1",
    port: int = 8600,
    allow_public: bool = False,
    public_url: str | None = None,
    secret_path: Path | None = None,
) -> None:
    """Serve the labeling page until Ctrl-C.

    Args:
        store_url: The run's preference store.
        config: What labelers are asked for.
        run_name: Shown to admins.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        allow_public: Whether the host may be one that other machines reach.
        public_url: What people type where a proxy stands in front, such as https://labels.example.org.
        secret_path: The file that keeps the secret behind sessions; by default beside a SQLite store. With another
            database and no file, a restart ends all sessions.

    Raises:
        UserError: If the host is public without leave, the port is taken, or the guidelines cannot be read.
    """
    _check(host, allow_public=allow_public, public_url=public_url)
    with _listening(host, port) as listener, contextlib.closing(PreferenceStore.open(store_url)) as store:
        base_url = public_url or f"http://{_in_url(host)}:{listener.getsockname()[1]}"
        site = site_at(base_url, host=host, run_name=run_name)
        secret_file = SecretFile(secret_path or _beside(store_url))
        app = make_app(store, config=config, site=site, secret_file=secret_file)
        server = _Server(settings(app, behind_proxy=public_url is not None))
        with server.capture_signals():
            print(f"Labeling page of {run_name}: {base_url} (Ctrl-C closes it)", flush=True)
            if allow_public and not site.secure:
                print(f"Careful: answers and sessions travel unencrypted. {_PROXY}", flush=True)
            server.run(sockets=[listener])
    print("The labeling page is closed; every answer that it confirmed is in the store.", flush=True)


class _Server(uvicorn.Server):
    """Ends its work at a signal. uvicorn would then raise the signal again, for whoever handled it before.

    By then there is nothing left to interrupt; and the command line's own handlers belong to runs, which go on later.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals inside the block."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second Ctrl-C does not wait for requests that are being answered."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True


def site_at(base_url: str, *, host: str, run_name: str) -> Site:
    """Describe a page that listens on `host` and that people reach at `base_url`."""
    name = urlsplit(base_url).hostname
    return Site(
        run_name=run_name,
        base_url=base_url,
        hosts=hosts_for(host, [name] if name else []),
        secure=base_url.startswith("https://"),
    )


_PROXY = (
    "Put a proxy that speaks TLS (Caddy, nginx) in front of the page on this machine, leave the page on 127.0.0.1, and "
    "give the proxy's https address as public_url."
)


def _check(host: str, *, allow_public: bool, public_url: str | None) -> None:
    if not _is_loopback(host) and not allow_public:
        raise UserError(
            f"{host} can be reached from other machines, and the page speaks plain HTTP",
            where="labeling page",
            next_step=f"{_PROXY} To open the page to a network that you trust all the same, say allow_public",
        )
    url = urlsplit(public_url or "https://none")
    if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/"):
        raise UserError(
            f"public_url = {public_url!r} is not the address of a page",
            where="labeling page",
            next_step="give scheme and name alone, such as https://labels.example.org",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(
            f"the page cannot listen on {host} port {port}: {error.strerror}",
            where="labeling page",
            next_step="choose another port; 0 takes a free one",
        ) from error


def settings(app: ASGIApp, *, behind_proxy: bool) -> uvicorn.Config:
    """Say how uvicorn serves the page: one worker, no access log, nothing about itself."""
    return uvicorn.Config(
        app,
        workers=1,
        # An access log would hold invite tokens.
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=behind_proxy,
        forwarded_allow_ips="127.0.0.1",
        ws="none",
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )


def _beside(store_url: str) -> Path | None:
    """Keep the secret where the database is, if that is a file."""
    scheme, _, rest = store_url.partition(":///")
    if not scheme.startswith(_SQLITE) or rest in ("", ":memory:"):
        return None
    return Path(rest).with_name("labeling.secret")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
