"""Connects only to addresses that were checked: a name is resolved once, and the connection goes to what was found."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx

from configs.addresses import forbidden

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> IP addresses, the preferred one first."""


class ForbiddenAddressError(Exception):
    """A name that leads where no request may go."""


async def look_up(host: str, port: int) -> Sequence[str]:
    """Ask the operating system for a host's addresses, in its order.

    Raises:
        OSError: If there is no such host.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that is empty or too long
        raise OSError(str(error)) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PinnedTransport(httpx.AsyncBaseTransport):
    """Resolves a name, checks every address found, and connects to those very addresses, one after the other.

    A name whose answer changes between the check and the connection (DNS rebinding) gains nothing by it. TLS still
    verifies the certificate against the name.

    Args:
        inner: Sends the requests.
        resolve: Finds a host's addresses.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, *, resolve: Resolve = look_up) -> None:
        self._inner = inner
        self._resolve = resolve

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request.

        Raises:
            ForbiddenAddressError: If one of the host's addresses may not be connected to.
            httpx.ConnectError: If the host is unknown or none of its addresses answers.
        """
        host = request.url.host
        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise httpx.ConnectError(f"{host} is unknown: {error}", request=request) from error
        for address in addresses:
            if (kind := forbidden(address)) is not None:
                raise ForbiddenAddressError(f"{host} is {address}, {kind}, which no endpoint may be at")
        failure: httpx.TransportError = httpx.ConnectError(f"{host} has no address", request=request)
        for address in addresses:
            try:
                return await self._inner.handle_async_request(_sent_to(address, request, share=1 / len(addresses)))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


def _sent_to(address: str, request: httpx.Request, *, share: float) -> httpx.Request:
    """Address a request to an IP address; its Host header and what TLS verifies stay the name's."""
    limits = dict(request.extensions.get("timeout", {}))
    if limits.get("connect") is not None:
        # One address that swallows packets must not use up the time of the next.
        limits["connect"] *= share
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "timeout": limits, "sni_hostname": request.url.host},
    )
