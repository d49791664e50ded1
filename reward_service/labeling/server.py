"""Serves the labeling page: one process, on this machine alone unless the user says otherwise in so many words."""

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from configs.labels import PeopleConfig
from protocol.errors import UserError
from reward_service.labeling.app import Site, make_app
from reward_service.labeling.guard import hosts_for
from reward_service.labeling.security import SecretFile
from reward_service.preferences.store import PreferenceStore

_SQLITE = "sqlite"
_BACKLOG = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the page is reached."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 8600
    """0 takes a free one."""
    allow_public: bool = False
    """Whether the host may be one that other machines reach."""
    public_url: str | None = None
    """What people type where a proxy stands in front, such as https://labels.example.org."""


def serve(
    store_url: str,
    *,
    config: PeopleConfig,
    run_name: str,
    address: Address,
    secret_path: Path | None = None,
    ready: Callable[[PreferenceStore, str], None] = lambda store, base_url: None,
) -> None:
    """Serve the labeling page until Ctrl-C.

    Args:
        store_url: The run's preference store.
        config: What labelers are asked for.
        run_name: Shown to admins.
        address: Where it is reached.
        secret_path: The file that keeps the secret behind sessions; by default beside a SQLite store. With another
            database and no file, a restart ends all sessions.
        ready: Called with the store and the page's address as soon as nothing can be refused any more.

    Raises:
        UserError: If the host is public without leave, the port is taken, or the guidelines cannot be read.
    """
    _check(address)
    with _listening(address) as listener, contextlib.closing(PreferenceStore.open(store_url)) as store:
        base_url = address.public_url or f"http://{_in_url(address.host)}:{listener.getsockname()[1]}"
        site = site_at(base_url, host=address.host, run_name=run_name)
        secret_file = SecretFile(secret_path or _beside(store_url))
        app = make_app(store, config=config, site=site, secret_file=secret_file)
        server = _Server(settings(app, behind_proxy=address.public_url is not None))
        with server.capture_signals():
            ready(store, base_url)
            print(f"Labeling page of {run_name}: {base_url} (Ctrl-C closes it)", flush=True)
            if address.allow_public and not site.secure:
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


def _check(address: Address) -> None:
    if not _is_loopback(address.host) and not address.allow_public:
        raise UserError(
            f"{address.host} can be reached from other machines, and the page speaks plain HTTP",
            where="labeling page",
            next_step=f"{_PROXY} To open the page to a network that you trust all the same, say allow_public",
        )
    url = urlsplit(address.public_url or "https://none")
    if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/"):
        raise UserError(
            f"public_url = {address.public_url!r} is not the address of a page",
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


def _listening(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UserError(
            f"the page cannot listen on {address.host} port {address.port}: {error.strerror}",
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
