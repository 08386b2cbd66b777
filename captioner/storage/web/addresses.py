"""Which addresses of the internet are public: a list from outside must not reach anything else."""

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

__all__ = ["private_host", "private_kind"]

# What Azure's virtual machines reach the platform by, under a public number.
_OF_PLATFORMS = {IPv4Address("168.63.129.16")}
# What some versions of Python take for global, by IANA's registries of special addresses.
_SPECIAL = (
    IPv4Network("192.0.0.0/24"),
    IPv6Network("64:ff9b:1::/48"),
    IPv6Network("3fff::/20"),
    IPv6Network("5f00::/16"),
    IPv6Network("fec0::/10"),
)
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291, section 2.5.5.1

# Names that resolve inside of a machine or a network alone (RFC 6761, RFC 6762, ICANN's .internal).
_PRIVATE_NAME = re.compile(r"(?:.*\.)?(?:localhost|local|internal)\.?", re.IGNORECASE)


def private_kind(address: str) -> str | None:
    """What kind of address that is not public an IP address is, in words; None if it is public.

    An IPv4 address inside of an IPv6 address counts as itself: the network may translate it.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and (inner := _inner(ip)) is not None:
        return private_kind(str(inner))
    if ip.is_loopback or ip.is_unspecified:
        return "a loopback address"
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast:
        return "a multicast address"
    if ip in _OF_PLATFORMS:
        return "an address of the cloud's platform"
    if ip.is_reserved:
        return "a reserved address"
    if not ip.is_global or any(ip in network for network in _SPECIAL):
        return "a private address"
    return None


def _inner(ip: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, compatible, NAT64, 6to4, Teredo."""
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def private_host(host: str) -> str | None:
    """As :func:`private_kind`, of a host as it is written, without resolving a name.

    An IPv4 address may be decimal, octal or hexadecimal, and in fewer than four parts:
    ``2130706433``, ``0177.0.0.1`` and ``0x7f.1`` are all 127.0.0.1.
    """
    host = host.strip("[]")
    if _PRIVATE_NAME.fullmatch(host):
        return "a name of the local network"
    try:
        return private_kind(host)
    except ValueError:
        pass
    try:
        return private_kind(socket.inet_ntoa(socket.inet_aton(host.rstrip("."))))
    except (OSError, UnicodeError):
        return None  # a name
