"""The proxy of a machine, spoken to as programs do: what it lets through arrives whole, and nothing else does."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helmr.errors import Unavailable
from helmr.guest import files
from worker.egress import Egress
from worker.egress_rules import Neighbourhood, Rules

pytestmark = pytest.mark.anyio


class _Echo(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = (
            f"{self.path} {self.headers['Host']} {self.headers.get('Proxy-Authorization')} {body.decode()}".encode()
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def web() -> Iterator[int]:
    """The port of an HTTP server on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


class Door:
    """What a supervisor does when somebody asks for its way out: it hands over a socket."""

    def __init__(self, path: Path, handed: socket.socket) -> None:
        self.path = path
        self._handed = handed
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._give)
        self._thread.start()

    def _give(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            files.send(connection, b"P", [self._handed.fileno()])

    def close(self) -> None:
        self._thread.join()
        self._listener.close()
        self._handed.close()


class Opened:
    """A proxy in use."""

    def __init__(self, egress: Egress, port: int) -> None:
        self.egress = egress
        self.port = port

    async def ask(self, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request(method, target, body, {"Proxy-Authorization": "Basic secret"})
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            finally:
                connection.close()

        return await asyncio.to_thread(ask)


@pytest.fixture
async def opened(tmp_path: Path, web: int) -> AsyncIterator[Opened]:
    """A proxy that lets through to the web server, by one name of it, and knows where NATS is."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    door = Door(tmp_path / "door", listener)
    neighbourhood = Neighbourhood.of({"HELMR_EGRESS_ALLOW": "127.0.0.0/8"}, servers=(("127.0.0.1", 4222),))
    egress = Egress("ws_test", Rules((f"localhost:{web}", "localhost:4222", "localhost:9"), neighbourhood))
    await egress.open(door.path)
    yield Opened(egress, port)
    await egress.close()
    door.close()


async def test_plain_http_arrives_without_what_is_for_the_proxy(opened: Opened, web: int) -> None:
    status, text = await opened.ask("POST", f"http://localhost:{web}/a/b?c=d#e", b"body")
    assert (status, text) == (200, f"/a/b?c=d localhost:{web} None body")
    assert (await opened.ask("POST", f"http://localhost:{web}", b"body"))[1].startswith("/ ")


async def test_a_tunnel_carries_both_ways_and_half_closes(opened: Opened) -> None:
    data = bytes(range(256)) * 4096 * 4

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(-1))[::-1])  # only once the other side has said that it is at its end
        await writer.drain()
        writer.close()

    far = await asyncio.start_server(serve, "127.0.0.1", 0)
    number = far.sockets[0].getsockname()[1]
    opened.egress._rules = Rules((f"localhost:{number}",), Neighbourhood.of({"HELMR_EGRESS_ALLOW": "127.0.0.0/8"}))
    reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
    writer.write(f"CONNECT localhost:{number} HTTP/1.1\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.write(data)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(-1), 60) == data[::-1]
    writer.close()
    far.close()


@pytest.mark.parametrize(
    ("method", "target", "status", "says"),
    [
        ("CONNECT", "elsewhere.example:443", 403, "not on this sandbox's list"),
        ("CONNECT", "127.0.0.1:4222", 403, "not on this sandbox's list"),
        ("CONNECT", "localhost:4222", 403, "NATS"),
        ("GET", "http://localhost:4222/", 403, "NATS"),
        ("CONNECT", "localhost:9", 502, "failed"),
        ("CONNECT", "localhost", 400, "no host and port"),
        ("CONNECT", "localhost:99999", 400, "no host and port"),
        ("GET", "/", 400, "proxy of a Helmr machine"),
        ("GET", "ftp://localhost/", 400, "proxy of a Helmr machine"),
        ("GET", "http://localhost:x/", 400, "no URL"),
    ],
)
async def test_anything_else_is_refused_and_told_why(
    opened: Opened, method: str, target: str, status: int, says: str
) -> None:
    found, text = await opened.ask(method, target)
    assert (found, says in text) == (status, True), text


async def test_a_name_that_leads_nowhere_is_named(opened: Opened) -> None:
    opened.egress._rules = Rules(None, Neighbourhood.of({}))
    found, text = await opened.ask("CONNECT", "nowhere.invalid:443")
    assert (found, "nowhere.invalid cannot be resolved: " in text) == (502, True), text


async def test_what_is_no_request_is_refused(opened: Opened) -> None:
    for head in (b"\x16\x03\x01 hello\r\n\r\n", b"GET /\r\n\r\n", b"x" * 200_000):
        reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
        writer.write(head)
        assert b"400 Bad Request" in await asyncio.wait_for(reader.read(1000), 60)
        writer.close()


async def test_too_many_connections_are_refused_and_all_are_closed_at_the_end(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.egress.MAX_CONNECTIONS", 3)
    clients = [await asyncio.open_connection("127.0.0.1", opened.port) for _ in range(4)]
    answers = [asyncio.create_task(reader.read(1000)) for reader, _ in clients]
    [refused], held = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    assert b"more than 3 connections" in refused.result()
    await opened.egress.close()
    assert await asyncio.wait_for(asyncio.gather(*held), 60) == [b""] * 3
    for _, writer in clients:
        writer.transport.abort()


async def test_only_a_listening_socket_is_taken_from_a_supervisor(tmp_path: Path) -> None:
    for number, handed in enumerate((socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX))):
        door = Door(tmp_path / str(number), handed)
        with pytest.raises(Unavailable, match="something else"):
            await Egress("ws_test", Rules(None, Neighbourhood())).open(door.path)
        door.close()
    with pytest.raises(Unavailable, match="hand over"):
        await Egress("ws_test", Rules(None, Neighbourhood())).open(tmp_path / "nobody")
