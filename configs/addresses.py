"""Which addresses a run may send texts to: none that hold a secret, none where clouds keep a machine's credentials."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import cast
from urllib.parse import parse_qsl, urlsplit

HIDDEN = "(hidden)"
_SECRET = re.compile(r"key|token|secret|passw|credential|auth(?!or)|signature|^(sig|code|pw|pwd)$", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s]+@")
_METADATA = frozenset(
    ipaddress.ip_address(address) for address in ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
"""Metadata services outside the link-local range: Alibaba Cloud, Azure, Oracle Cloud, AWS over IPv6."""
_ENDING_IN_IPV4 = tuple(ipaddress.IPv6Network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96"))
"""Their last 32 bits are an IPv4 address: NAT64 (RFC 6052, RFC 8215), IPv4-compatible (RFC 4291)."""
_LOCAL_NAT64 = _ENDING_IN_IPV4[1]
"""A site cuts prefixes of any length out of it; the shorter ones leave the address in the middle, around byte 8."""


def with_passwords(values: object, path: str = "") -> list[str]:
    """Find the addresses with a password in them (`scheme://user:password@host`) in a tree of values.

    Args:
        values: Mappings, lists and whatever else.
        path: The dotted key of the tree itself.

    Returns:
        The dotted key of each.
    """
    if isinstance(values, Mapping):
        below = cast(Mapping[object, object], values).items()
    elif isinstance(values, list):
        below = enumerate(cast(list[object], values))
    else:
        return [path] if isinstance(values, str) and _PASSWORD.search(values) else []
    return [found for key, value in below for found in with_passwords(value, f"{path}.{key}" if path else str(key))]


def without_passwords(text: str) -> str:
    """Hide the password of every address in a text."""
    return _PASSWORD.sub(rf"\1:{HIDDEN}@", text)


def forbidden(address: str) -> str | None:
    """Say why an IP address must not be connected to.

    Link-local addresses (RFC 3927, RFC 4291) are where a cloud hands a machine its credentials; the same addresses
    wrapped into IPv6 (mapped, compatible, 6to4, NAT64) are meant too.

    Args:
        address: An IP address, not a name.

    Returns:
        What kind of address it is, or None if it may be connected to.
    """
    ip = ipaddress.ip_address(address)
    meant = [ip, *_embedded(ip)] if isinstance(ip, ipaddress.IPv6Address) else [ip]
    if any(each.is_link_local for each in meant):
        return "a link-local address"
    return "a cloud's metadata service" if _METADATA.intersection(meant) else None


def _embedded(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """List the IPv4 addresses that an IPv6 address may stand for."""
    packed = ip.packed
    places = [packed[12:]] if any(ip in network for network in _ENDING_IN_IPV4) else []
    if ip in _LOCAL_NAT64:
        places += [packed[6:8] + packed[9:11], packed[7:8] + packed[9:12], packed[9:13]]
    named = [each for each in (ip.ipv4_mapped, ip.sixtofour) if each is not None]
    return [*named, *map(ipaddress.IPv4Address, places)]


def trouble(url: str, *, allowed_hosts: Sequence[str] | None = None) -> str | None:
    """Say what is wrong with the address of an endpoint, without quoting what may be secret.

    What a name resolves to is checked again by whoever connects.

    Args:
        url: An http or https address.
        allowed_hosts: `HOST` or `HOST:PORT` each; None allows whatever the address names.

    Returns:
        The problem, or None.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if "@" in parts.netloc:
        return f"the address at {host} holds a user or a password; a token goes into a variable that token_env names"
    if any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        return f"the address at {host} seems to hold a secret in its query; name its variable with token_env instead"
    if (kind := _kind_of(host)) is not None:
        return f"{host} is {kind}, which no endpoint may be at"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    name = f"[{host}]" if ":" in host else host
    if allowed_hosts is not None and not {name, f"{name}:{port}"} & {entry.lower() for entry in allowed_hosts}:
        return f"{name}:{port} is not among cluster.allowed_hosts ({', '.join(allowed_hosts) or 'none'})"
    return None


def _kind_of(host: str) -> str | None:
    try:
        return forbidden(host)
    except ValueError:  # a name
        return None
