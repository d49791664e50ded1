"""What every request passes before the page sees it: the right host, not too many, not too large; and what every
answer carries."""

import asyncio
import ipaddress
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_service.labeling.security import Refusal

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # The invite link holds a token; no other site is to see it.
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=(), clipboard-read=()",
}
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
READS = frozenset({"GET", "HEAD"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A token bucket: `burst` requests at once, and then `per_s` of them a second."""

    per_s: float
    burst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much the page takes."""

    body_bytes: int = 64 * 1024
    body_s: float = 10.0
    """How long a request may take to send its body."""
    labeler: Rate = Rate(per_s=5.0, burst=60)
    address: Rate = Rate(per_s=200.0, burst=1000)
    """Many labelers may share one address."""
    join: Rate = Rate(per_s=0.5, burst=30)
    """Invite links opened from one address."""


class Buckets:
    """Token buckets by key; only ever touched by the event loop.

    Args:
        rate: How fast they fill, and how much they hold.
    """

    MANY = 10_000

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, key: str, *, now: float) -> float:
        """Take one token.

        Args:
            key: Whose bucket.
            now: Seconds, on a clock that never goes back.

        Returns:
            0, or the seconds until there is a token.
        """
        level, since = self._levels.get(key, (float(self._rate.burst), now))
        level = min(float(self._rate.burst), level + (now - since) * self._rate.per_s)
        if level < 1.0:
            self._levels[key] = (level, now)
            return (1.0 - level) / self._rate.per_s
        self._levels[key] = (level - 1.0, now)
        if len(self._levels) > self.MANY:
            self._forget_full(now)
        return 0.0

    def _forget_full(self, now: float) -> None:
        burst, per_s = self._rate.burst, self._rate.per_s
        self._levels = {k: (n, t) for k, (n, t) in self._levels.items() if n + (now - t) * per_s < burst}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The names under which the page may be asked for, so that no other site's name can be pointed at it."""

    names: frozenset[str]
    any_address: bool = False
    """Whether a plain IP address will do; it cannot be pointed elsewhere."""

    def allow(self, host: str) -> bool:
        """Tell whether a Host header names this page."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.names:
            return True
        return self.any_address and _is_address(name)

    def is_origin(self, origin: str, *, host: str) -> bool:
        """Tell whether an Origin header names this page; a proxy in front of it may have changed the Host header."""
        parts = urlsplit(origin)
        return parts.netloc == host or (parts.hostname or "").lower() in self.names


class Guard:
    """ASGI middleware around the whole page.

    Args:
        app: The page.
        hosts: Under which names it answers.
        limits: How much it takes.
        labeler_of: Who a request's session belongs to, without asking the database.
        refuse: Makes the answer to a request that is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Hosts,
        limits: Limits,
        labeler_of: Callable[[Request], str | None],
        refuse: Callable[[Request, Refusal], Response],
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._limits = limits
        self._labeler_of = labeler_of
        self._refuse = refuse
        self._labelers = Buckets(limits.labeler)
        self._addresses = Buckets(limits.address)
        self._joins = Buckets(limits.join)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("cache-control", "no-store")
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self._check_host(request.headers)
            self._check_rates(request)
            self._check_origin(request)
            body = b"" if request.method in READS else await self._whole_body(request)
        except Refusal as refusal:
            await self._refuse(request, refusal)(scope, receive, send_guarded)
            return
        except ClientDisconnect:
            return
        await self._app(scope, _replayed(body, receive), send_guarded)

    def _check_host(self, headers: Headers) -> None:
        if len(headers.getlist("host")) != 1 or not self._hosts.allow(headers["host"]):
            raise Refusal(400, "This page does not answer under that name.")

    def _check_origin(self, request: Request) -> None:
        """Refuse what another site makes a browser send; the form token says the same once more."""
        if request.method in READS:
            return
        site = request.headers.get("sec-fetch-site", "same-origin")
        # A plain form sends Origin: null, because the page asks for no referrer.
        origin = request.headers.get("origin", "null")
        ours = origin == "null" or self._hosts.is_origin(origin, host=request.headers["host"])
        if site not in ("same-origin", "none") or not ours:
            raise Refusal(403, "This request came from another site.")

    def _check_rates(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        address = request.client.host if request.client else "unknown"
        waits = [self._addresses.take(address, now=now)]
        if request.url.path.startswith("/join/"):
            waits.append(self._joins.take(address, now=now))
        labeler_id = None if request.url.path.startswith("/static/") else self._labeler_of(request)
        if labeler_id is not None:
            waits.append(self._labelers.take(labeler_id, now=now))
        if max(waits) > 0.0:
            raise Refusal(
                429, "That was too many requests in a short time. Wait a moment.", retry_after_s=max(waits), keep=True
            )

    async def _whole_body(self, request: Request) -> bytes:
        limit = self._limits.body_bytes
        too_large = Refusal(413, f"That was too much text: a form may hold {limit // 1024} KiB.")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(400, "The length of the request makes no sense.")
        if int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "The request took too long to arrive.", keep=True) from None
        return bytes(body)


def hosts_for(host: str, names: Iterable[str]) -> Hosts:
    """Say which Host headers a server answers.

    Args:
        host: The address it listens on.
        names: Further names, such as the one of a proxy in front of it.
    """
    local = host in LOOPBACK_NAMES
    return Hosts(names=LOOPBACK_NAMES | {host.lower()} | {name.lower() for name in names}, any_address=not local)


def retry_after(refusal: Refusal) -> dict[str, str]:
    """Return the header that says when to come back, where there is something to say."""
    if refusal.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(refusal.retry_after_s)))}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _replayed(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def once() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once
