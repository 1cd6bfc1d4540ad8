"""The proxy through which machines reach the world: the one way out, so that what is not allowed cannot be reached at all.

A machine has no network. On its loopback interface it finds an HTTP proxy (``CONNECT`` for anything, and plain HTTP), whose
listening socket its supervisor has handed to us: see :mod:`helmr.guest.doors`. We accept, look at what is wanted
(:mod:`worker.egress_rules`), connect from here, and carry bytes. This needs no firewall, and no right that a worker may lack.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from helmr.errors import HelmrError, Unavailable
from helmr.guest import files
from worker.egress_rules import Refused, Rules

log = logging.getLogger(__name__)

#: Connections of one machine at a time; more are refused, so that one task cannot take the worker's descriptors from all.
MAX_CONNECTIONS = 256
#: Names of one machine that are looked up at a time.
_LOOKUPS = 4
#: Seconds for a client to say what it wants, for the supervisor to hand over its socket, and for a host to answer.
_HEAD_TIMEOUT, _HANDOVER_TIMEOUT, _CONNECT_TIMEOUT = 30.0, 10.0, 15.0
#: Bytes of a request's head, and of what is carried at once.
_HEAD_LIMIT, _CHUNK = 64 * 1024, 128 * 1024
_TARGET = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+)):(?P<port>\d{1,5})")
#: Headers between a client and its proxy, which are no business of the host's; and who the host is we say ourselves.
_HOP = (b"proxy-", b"connection:", b"keep-alive:", b"host:")


class _Wanted(NamedTuple):
    """What a request asks for: whom to connect to, and what to say to it first (nothing: a tunnel)."""

    host: str
    port: int
    opening: bytes


class _Bad(Exception):
    """A request that is none; the text says what is wrong with it."""


class Egress:
    """The way out of one machine, until :meth:`close`; the log calls it by its ``name``."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self._rules = rules
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        # Its own: names that take long to be found must not keep anything else of the worker waiting.
        self._lookups = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="egress")

    async def open(self, door: Path) -> None:
        """Take the listening socket from the supervisor behind ``door``, and serve it.

        Raises:
            Unavailable: it does not hand over one that we may use.
        """
        try:
            listener = await asyncio.to_thread(_take_listener, door)
        except OSError as error:
            raise Unavailable(f"the machine does not hand over its way out: {error}") from error
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=_HEAD_LIMIT)

    async def close(self) -> None:
        """Serve nobody any more, and hang up on whoever is connected."""
        if self._server is not None:
            self._server.close()
        self._lookups.shutdown(wait=False, cancel_futures=True)
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError) as error:
            log.debug("%s: a connection ended: %r", self.name, error)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            wanted = await self._listen(reader)
            far_reader, far_writer = await self._connect(wanted)
        except (_Bad, asyncio.LimitOverrunError) as error:
            return await _say(writer, "400 Bad Request", str(error))
        except Refused as refusal:
            log.info("%s: refused: %s", self.name, refusal)
            return await _say(writer, "403 Forbidden", str(refusal))
        except (HelmrError, OSError, TimeoutError) as error:
            return await _say(writer, "502 Bad Gateway", str(error) or "the host does not answer")
        try:
            if wanted.opening:
                far_writer.write(wanted.opening)
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))
        finally:
            far_writer.transport.abort()
        return None

    async def _listen(self, reader: asyncio.StreamReader) -> _Wanted:
        if len(self._connections) > MAX_CONNECTIONS:
            raise _Bad(f"more than {MAX_CONNECTIONS} connections at once")
        async with asyncio.timeout(_HEAD_TIMEOUT):
            return _understand(await reader.readuntil(b"\r\n\r\n"))

    async def _connect(self, wanted: _Wanted) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the first address of the host that is allowed and answers."""
        self._rules.check_name(wanted.host, wanted.port)
        loop = asyncio.get_running_loop()
        failure: Exception = Unavailable(f"{wanted.host} has no address")
        for address in await loop.run_in_executor(self._lookups, self._look_up, wanted.host, wanted.port):
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    return await asyncio.open_connection(address, wanted.port, limit=_CHUNK)
            except (OSError, TimeoutError) as error:
                failure = error
        raise failure

    def _look_up(self, host: str, port: int) -> list[str]:
        """The addresses of a host that may be connected to; in a thread, because both finding and judging them may take long.

        Raises:
            Refused: it has some, but none that may.
            Unavailable: its name leads to none.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unavailable(f"{host} cannot be resolved: {error.strerror or error}") from error
        allowed, refusals = [], []
        for info in found:
            try:
                self._rules.check_address(str(info[4][0]), port)
                allowed.append(str(info[4][0]))
            except Refused as refusal:
                refusals.append(refusal)
        if not allowed and refusals:
            raise refusals[0]
        return allowed


def _take_listener(door: Path) -> socket.socket:
    """The socket a supervisor hands over, if it is what it should be: who is in there may have been replaced.

    Raises:
        OSError: it is not, or nobody is there.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_HANDOVER_TIMEOUT)
        connection.connect(str(door))
        _, descriptors = files.receive(connection, 1, 1)
    if not descriptors:
        raise ConnectionError("it sent no socket")
    listener = socket.socket(fileno=descriptors[0])
    if listener.family != socket.AF_INET or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.close()
        raise ConnectionError("it sent something else")
    listener.setblocking(False)
    return listener


def _understand(head: bytes) -> _Wanted:
    line, _, headers = head.partition(b"\r\n")
    words = line.decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Bad("that is no HTTP/1 request")
    method, target, version = words
    if method == "CONNECT":
        return _Wanted(*_host_and_port(target), b"")
    try:
        url = urlsplit(target)
        port = url.port or 80
    except ValueError as error:
        raise _Bad(f"{target!r} is no URL: {error}") from error
    if url.scheme != "http" or not url.hostname:
        raise _Bad("this is the proxy of a Helmr machine: it takes CONNECT, and requests for http:// URLs")
    path = target[len("http://") + len(url.netloc) :].partition("#")[0]
    path = path if path.startswith("/") else f"/{path}"
    kept = [each for each in headers.split(b"\r\n") if each and not each.lower().startswith(_HOP)]
    host = url.netloc.rpartition("@")[2]
    # One request per connection: the next one could be for somebody else.
    opening = [f"{method} {path} {version}\r\nHost: {host}\r\nConnection: close".encode("latin-1"), *kept, b"", b""]
    return _Wanted(url.hostname, port, b"\r\n".join(opening))


def _host_and_port(target: str) -> tuple[str, int]:
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise _Bad(f"{target!r} is no host and port")
    return match["six"] or match["name"], int(match["port"])


async def _say(writer: asyncio.StreamWriter, status: str, text: str) -> None:
    body = f"helmr: {text}\n".encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    await writer.drain()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes one way until they end, then say so: the other way may go on."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
