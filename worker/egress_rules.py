"""What a machine may reach: which hosts and ports by name, and which of the addresses behind a name.

Both are asked for every connection. The name decides about lists of hosts; the address keeps everybody away from what is near
the worker: its own services, its network, a cloud's metadata. It is the address itself that is connected to afterwards, so
that a name which means something else a moment later leads nowhere else.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from helmr.errors import ConfigError
from helmr.sandbox import parse_host

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ALLOW_VARIABLE, DENY_VARIABLE = "HELMR_EGRESS_ALLOW", "HELMR_EGRESS_DENY"

#: The ports of a listed host that are open when the list names none.
WEB_PORTS = (80, 443)
#: Public by their numbers, but a cloud's own: Azure's host agent; and IPv6 addresses that stand for IPv4 ones, which a
#: translator on the way would turn into whatever they contain (RFC 3056, 4380, 6052, 8215).
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in ("168.63.129.16/32", "2002::/16", "2001::/32", "64:ff9b::/96", "64:ff9b:1::/48")
)
#: Of nobody (RFC 5737), so that there is nothing to protect; some networks translate real hosts to them.
_DOCUMENTATION = tuple(ipaddress.ip_network(text) for text in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24"))
#: The kernel's tables of routes: what is listed without a gateway is a network that the machine is on.
_ROUTES = (Path("/proc/net/route"), Path("/proc/net/ipv6_route"))
_ENTRY = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<four>[0-9.]+))(?P<prefix>/\d+)?(?::(?P<port>\d+))?")


class Refused(Exception):
    """A connection that must not be made, and why."""


class Block(NamedTuple):
    """A network, or one port of it."""

    network: Network
    port: int | None

    def has(self, address: Address, port: int) -> bool:
        """Whether an address and port are in it."""
        return address in self.network and self.port in (None, port)


class Neighbourhood(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says about addresses near the worker, and where NATS is.

    ``closed`` beats ``opened``, and ``servers`` (host and port) are closed to everybody: whoever reaches NATS is in charge.
    """

    opened: tuple[Block, ...] = ()
    closed: tuple[Block, ...] = ()
    servers: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ, servers: tuple[tuple[str, int], ...] = ()) -> Neighbourhood:
        """As ``HELMR_EGRESS_ALLOW`` and ``HELMR_EGRESS_DENY`` say, e.g. ``10.1.0.0/16:443, 127.0.0.1:11434, [fd00::]/8``.

        Raises:
            ConfigError: an entry is no network.
        """
        opened, closed = (_blocks(name, environ.get(name, "")) for name in (ALLOW_VARIABLE, DENY_VARIABLE))
        return cls(opened=opened, closed=closed, servers=servers)

    def check(self, address: Address, port: int) -> None:
        """Whether an address may be connected to.

        Raises:
            Refused: it may not.
        """
        if any(block.has(address, port) for block in self.closed):
            raise Refused(f"{address} port {port} is closed by {DENY_VARIABLE}")
        if self._is_server(address, port):
            raise Refused(f"{address} port {port} is Helmr's own NATS server")
        if any(block.has(address, port) for block in self.opened):
            return
        if not _is_public(address):
            raise Refused(
                f"{address} is not a public address; the operator of the worker can open it: {ALLOW_VARIABLE}"
            )
        if is_own(address) or is_neighbour(address):
            raise Refused(f"{address} is in the worker's own network; its operator can open it: {ALLOW_VARIABLE}")

    def _is_server(self, address: Address, port: int) -> bool:
        for host, number in self.servers:
            if number == port:
                try:
                    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                except OSError:
                    continue  # where it is we cannot be told; a name that means nothing here leads nowhere either
                if any(plain(str(info[4][0])) == address for info in found):
                    return True
        return False


class HostRule(NamedTuple):
    """An entry of a list of hosts: ``api.example.com``, ``*.example.org`` (any name below it), ``git.example.com:22``."""

    name: str
    below: bool
    ports: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """The rule that is written so."""
        name, below, port = parse_host(text)
        return cls(name, below, WEB_PORTS if port is None else (port,))

    def has(self, host: str, port: int) -> bool:
        """Whether a host and port are meant."""
        return port in self.ports and (host.endswith(f".{self.name}") if self.below else host == self.name)


class Rules:
    """The rules of one machine: anything public, or a list of ``hosts``."""

    def __init__(self, hosts: tuple[str, ...] | None, neighbourhood: Neighbourhood) -> None:
        self._hosts = None if hosts is None else tuple(map(HostRule.parse, hosts))
        self._neighbourhood = neighbourhood

    def check_name(self, host: str, port: int) -> None:
        """Whether a host may be connected to, as far as its name tells.

        Raises:
            Refused: it is not on the list.
        """
        name = host.lower().rstrip(".")
        if self._hosts is not None and not any(rule.has(name, port) for rule in self._hosts):
            raise Refused(f"{name} port {port} is not on this sandbox's list of hosts")

    def check_address(self, text: str, port: int) -> None:
        """Whether an address may be connected to.

        Raises:
            Refused: it may not.
        """
        self._neighbourhood.check(plain(text), port)


def plain(text: str) -> Address:
    """An address without its scope; an IPv4 address that is written as IPv6 is what it is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_public(address: Address) -> bool:
    if _is_in(address, _DOCUMENTATION):
        return True
    if address.is_multicast or address.is_reserved or address.is_link_local or not address.is_global:
        return False
    return not _is_in(address, _NEVER)


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def is_own(address: Address) -> bool:
    """Whether an address is this machine's own: then, and only then, the kernel would send from it to it. Sends nothing."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:
            return False  # there is no way to it at all
        return plain(probe.getsockname()[0]) == address


def is_neighbour(address: Address) -> bool:
    """Whether an address is in a network that this machine is on: public or not, its hosts may trust us more than others do."""
    return _is_in(address, _networks_4() if address.version == 4 else _networks_6())


def _networks_4() -> Iterator[Network]:
    for line in _lines(_ROUTES[0])[1:]:
        interface, network, gateway, *_, mask, _, _, _ = line.split()
        if int(gateway, 16) == 0 and int(mask, 16) != 0 and interface != "lo":
            numbers = (int.from_bytes(bytes.fromhex(each)[::-1]) for each in (network, mask))
            yield ipaddress.ip_network("/".join(str(ipaddress.IPv4Address(number)) for number in numbers))


def _networks_6() -> Iterator[Network]:
    for line in _lines(_ROUTES[1]):
        network, length, _, _, gateway, *_, interface = line.split()
        if int(gateway, 16) == 0 and int(length, 16) != 0 and interface != "lo":
            yield ipaddress.ip_network((int(network, 16), int(length, 16)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []  # no such protocol, or no such system


def _blocks(variable: str, text: str) -> tuple[Block, ...]:
    return tuple(_block(variable, entry.strip()) for entry in text.split(",") if entry.strip())


def _block(variable: str, entry: str) -> Block:
    match = _ENTRY.fullmatch(entry)
    address = (match["six"] or match["four"]) + (match["prefix"] or "") if match else entry
    try:
        network = ipaddress.ip_network(address, strict=False)
    except ValueError as error:
        raise ConfigError(
            f"{variable}: {entry!r} is not a network", hint="write e.g. 10.1.0.0/16, 127.0.0.1:11434 or [fd00::]/8:443"
        ) from error
    return Block(network, int(match["port"]) if match and match["port"] else None)
