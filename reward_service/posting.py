"""Posts JSON to a server that somebody else runs, and expects the worst of it."""

import asyncio
import email.utils
import ipaddress
import json
import logging
import os
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from configs.addresses import trouble
from protocol.errors import UserError
from reward_service.pinned import ForbiddenAddressError, PinnedTransport

MAX_ANSWER_BYTES = 1 << 20
_MAY_PASS = frozenset({429, 502, 503, 504})
_LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)

logger = logging.getLogger(__name__)


class NoAnswer(Exception):
    """Say why one try brought no answer, whether another may, and how long the server asks to wait."""

    def __init__(self, reason: str, *, may_pass: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server sent back."""

    status: int
    data: bytes
    """The body; an error's is cut off at about `MAX_ANSWER_BYTES`."""
    retry_after_s: float
    """What Retry-After asks for; 0 without one."""


def may_pass(status: int) -> bool:
    """Tell whether the same request may succeed a little later: 429, 502, 503 and 504 say so (RFC 9110, RFC 6585)."""
    return status in _MAY_PASS


class Endpoint:
    """A server at a configured address, and the token that it wants.

    Requests go to that address alone: redirects are not followed, what the host's name resolves to is checked before
    each connection, and proxies are not used for this machine. Where the environment names a proxy for the address, it
    is the proxy that resolves the name. The token is read from the environment and shown nowhere.

    Args:
        url: The address.
        where: Who it is, for errors.
        token_env: The environment variable that holds the bearer token, if there is one.

    Raises:
        UserError: If the address may hold a secret or may not be asked, or the token is not there or not usable.
    """

    def __init__(self, url: str, *, where: str, token_env: str | None) -> None:
        parts = urlsplit(url)
        # The address is not quoted: a part of it may be meant as a password.
        problem = trouble(url) if _host(url) == parts.hostname else "its url cannot be read as an address"
        if problem is not None:
            raise UserError(problem, where=where, next_step="change url")
        self.url = url
        self.host = parts.netloc
        self._is_local = _is_local(parts.hostname or "")
        self._token = _read_token(token_env, where=where)
        self._proxy = None if self._is_local else _proxy_for(parts.scheme, self.host)
        # Reading the certificates takes a moment, so it is done once.
        self._tls = httpx.create_ssl_context()
        if self._token and parts.scheme == "http" and not self._is_local:
            logger.warning("%s: the token goes over the network in the clear; use https", where)

    def client(self, *, max_connections: int) -> httpx.AsyncClient:
        """Open a client; it belongs to the event loop that it is opened in."""
        # Nothing is decompressed, so that a small body cannot become a large one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        limits = httpx.Limits(max_connections=max_connections)
        transport: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(
            verify=self._tls, limits=limits, proxy=self._proxy
        )
        if self._proxy is None:
            transport = PinnedTransport(transport)
        return httpx.AsyncClient(headers=headers, follow_redirects=False, transport=transport)

    async def post(self, client: httpx.AsyncClient, url: str, *, body: bytes, limit_s: float) -> Reply:
        """Post once, within `limit_s` seconds from the connection to the body's last byte.

        Raises:
            NoAnswer: If nothing came, the connection was lost, or the answer is larger than `MAX_ANSWER_BYTES`.
        """
        try:
            async with (
                asyncio.timeout(limit_s),
                client.stream("POST", url, content=body, timeout=limit_s) as response,
            ):
                data = await _read_body(response)
        except TimeoutError:
            raise NoAnswer(f"no answer: none within {limit_s:g} s", may_pass=True) from None
        except ForbiddenAddressError as error:
            raise NoAnswer(f"not asked: {error}", may_pass=False) from None
        except httpx.TransportError as error:
            reason = f"no answer: {type(error).__name__}: {self.clean(str(error))}"
            raise NoAnswer(reason, may_pass=isinstance(error, _LOST)) from None
        if response.is_success and len(data) > MAX_ANSWER_BYTES:
            raise NoAnswer(f"oversized answer: more than {MAX_ANSWER_BYTES} bytes", may_pass=False)
        return Reply(status=response.status_code, data=data, retry_after_s=_retry_after_s(response))

    def said(self, reply: Reply) -> str:
        """Find what an error body says, in OpenAI's form or in any other."""
        text = reply.data.decode("utf-8", "replace")
        try:
            body: Any = json.loads(text)
        except (ValueError, RecursionError):
            return self.clean(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            error = " ".join(str(error[name]) for name in ("message", "detail", "code") if error.get(name))
        return self.clean(str(error))

    def clean(self, text: str) -> str:
        """Shorten what a server said; some servers quote the token they were sent."""
        if self._token:
            text = text.replace(self._token, "[token]")
        text = " ".join(text.split())[:200]
        return "".join(letter if letter.isprintable() else "?" for letter in text)


def _host(url: str) -> str | None:
    """Read the host as the library does that connects to it; two readings of one address would be a way around it."""
    try:
        return httpx.URL(url).host
    except httpx.InvalidURL:
        return None


def _read_token(name: str | None, *, where: str) -> str | None:
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    # Checked here, because the error of a library would quote the header.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"the environment variable {name} {'holds no usable token' if token else 'is not set'}",
            where=where,
            next_step=f"export {name}=... before starting, on every node",
        )
    return token


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy_for(scheme: str, host: str) -> str | None:
    """Read which proxy the environment names (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    proxies = urllib.request.getproxies()
    return None if urllib.request.proxy_bypass(host) else proxies.get(scheme) or proxies.get("all")


async def _read_body(response: httpx.Response) -> bytes:
    """Read a body, but stop once it is larger than an answer may be."""
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            break
    return bytes(data)


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
