"""The supervisor by itself, as a plain process: what it relays, what it survives, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from helmr.errors import Conflict, TooLarge, Unavailable
from helmr.guest import protocol
from tests.integration.supervisors import SUPERVISOR, Boot, Guest
from worker.channel import Channel, ChannelProcess
from worker.engine import Exited, Message, Output, ProcessSpec

pytestmark = pytest.mark.anyio

_ids = iter(range(1_000_000))


async def _task(channel: Channel, do: str, **task: Any) -> ChannelProcess:
    options = {name: task.pop(name) for name in ("secrets", "deadline", "grace") if name in task}
    return await channel.start(ProcessSpec(id=f"t{next(_ids)}", task={"do": do, **task}, **options))


async def _all(process: ChannelProcess) -> tuple[bytes, bytes, list[dict[str, Any]], Exited]:
    written = {"stdout": b"", "stderr": b""}
    messages: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        frames = [frame async for frame in process.frames()]
    for frame in frames:
        if isinstance(frame, Output):
            written[frame.stream] += frame.data
        elif isinstance(frame, Message):
            messages.append(frame.body)
    assert isinstance(frames[-1], Exited)
    return written["stdout"], written["stderr"], messages, frames[-1]


async def _pid(process: ChannelProcess) -> int:
    """The process id that the task ``sleep`` begins with."""
    frame = await anext(process.frames())
    assert isinstance(frame, Output)
    return int(frame.data)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# What tasks say


async def test_a_message_comes_after_the_output_written_before_it(channel: Channel) -> None:
    process = await _task(channel, "alternate", count=3000)
    written = {"stdout": b"", "stderr": b""}
    expected = 0
    async for frame in process.frames():
        if isinstance(frame, Output):
            written[frame.stream] += frame.data
        elif isinstance(frame, Message):
            assert frame.body == {"n": expected}
            assert written["stderr" if expected % 2 else "stdout"].endswith(b"\n")
            assert int(written["stderr" if expected % 2 else "stdout"].split()[-1]) >= expected
            expected += 1
    assert expected == 3000


@pytest.mark.parametrize(
    ("task", "detail"),
    [
        ({"text": "", "size": protocol.MAX_MESSAGE + 1}, "1048577 bytes exceeds the limit of 1048576"),
        ({"text": "no"}, "is not JSON"),
        ({"text": "[]"}, "not an object"),
        ({"text": '{"n": NaN}'}, "NaN"),
    ],
)
async def test_a_task_that_breaks_the_protocol_is_ended(channel: Channel, task: dict[str, Any], detail: str) -> None:
    _, _, messages, exited = await _all(await _task(channel, "raw", **task))
    assert messages == []
    assert (exited.signal, exited.cause) == (signal.SIGKILL, "exit")
    assert detail in exited.detail


async def test_the_largest_message_passes(channel: Channel) -> None:
    text = '{"a": "' + "x" * (protocol.MAX_MESSAGE - 9) + '"}'
    process = await _task(channel, "raw", text=text)
    frame = await anext(process.frames())
    assert isinstance(frame, Message)
    assert len(frame.body["a"]) == protocol.MAX_MESSAGE - 9
    await process.cancel(0)
    await _all(process)


@pytest.mark.parametrize(
    ("do", "options", "code", "written"),
    [
        ("code", {"code": 3}, 3, (b"", b"")),
        ("fail", {}, 1, (b"", b"ValueError: as asked\n")),
        ("leave", {"code": 4}, 4, (b"", b"")),
        ("leave", {"code": None}, 0, (b"", b"")),
        ("leave", {"code": "farewell"}, 1, (b"", b"farewell\n")),
        ("last_words", {}, 0, (b"exit function\nbuffered", b"")),
        ("hush", {}, 6, (b"", b"")),
    ],
)
async def test_the_end_of_a_runner_is_that_of_a_program(
    channel: Channel, do: str, options: dict[str, Any], code: int, written: tuple[bytes, bytes]
) -> None:
    out, err, _, exited = await _all(await _task(channel, do, **options))
    assert (exited.exit_code, exited.signal, exited.cause, exited.detail) == (code, None, "exit", "")
    assert (out, err.splitlines(keepends=True)[-1:]) == (written[0], [written[1]] if written[1] else [])


# What tasks are told


async def test_messages_reach_the_task_in_order(channel: Channel) -> None:
    process = await _task(channel, "echo", count=31)
    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(process.send({"n": number}))
        group.create_task(process.send({"text": "x" * 1_000_000}))
    _, _, messages, _ = await _all(process)
    assert [message["echo"] for message in messages] == [*range(30), None]
    assert messages[-1]["length"] > 1_000_000


async def test_a_message_that_is_too_large_is_refused_here(channel: Channel) -> None:
    process = await _task(channel, "sleep")
    with pytest.raises(TooLarge):
        await process.send({"text": "x" * protocol.MAX_MESSAGE})
    await process.cancel(0)
    await _all(process)


async def test_a_message_to_a_task_that_never_reads_fails_when_it_ends(channel: Channel) -> None:
    process = await _task(channel, "sleep")
    sends = [asyncio.ensure_future(process.send({"text": "x" * 900_000})) for _ in range(3)]
    assert (await run_through(channel)).exit_code == 0
    assert not any(send.done() for send in sends)
    await process.cancel(0)
    await _all(process)
    for outcome in await asyncio.gather(*sends, return_exceptions=True):
        assert isinstance(outcome, Conflict)
    with pytest.raises(Conflict, match="has ended"):
        await process.send({})


async def run_through(channel: Channel) -> Exited:
    """A whole process, to see that the supervisor works."""
    return (await _all(await _task(channel, "code", code=0)))[3]


# Secrets


async def test_neither_supervisor_nor_zygote_nor_the_next_task_knows_a_secret(guest: Guest, channel: Channel) -> None:
    secret = "s3cr3t-" + os.urandom(8).hex()
    process = await _task(channel, "sleep", secrets={"TOKEN": secret})
    pid = await _pid(process)
    for known in (guest.process.pid, guest.zygote()):
        for name in ("environ", "cmdline"):
            assert secret.encode() not in Path(f"/proc/{known}/{name}").read_bytes()
    assert secret.encode() not in _memory(guest.zygote())
    assert secret.encode() in _memory(pid)
    await process.cancel(0)
    await _all(process)
    later = await _task(channel, "sleep")
    assert secret.encode() not in _memory(await _pid(later))
    await later.cancel(0)
    await _all(later)


def _memory(pid: int) -> bytes:
    """All anonymous and heap memory of a process."""
    found = b""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, _, _, inode, *_ = line.split()
            if rights.startswith("rw") and inode == "0":
                start, end = (int(edge, 16) for edge in place.split("-"))
                memory.seek(start)
                found += memory.read(end - start) or b""
    return found


# Clients


@contextlib.asynccontextmanager
async def _silent_client(guest: Guest) -> AsyncIterator[socket.socket]:
    """Says hello, starts a flood, and never reads."""
    (await guest.connect()).close()  # it is up
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.path))
        client.sendall(protocol.json_frame(protocol.HELLO, {"taken": {}}))
        spec = {"id": "flood", "task": {"do": "flood", "count": 600}}
        client.sendall(protocol.json_frame(protocol.START, spec, 1))
        client.recv(1)
        yield client


async def test_a_client_that_stalls_is_displaced_and_nothing_is_lost(guest: Guest) -> None:
    async with _silent_client(guest):
        channel = await guest.connect()
        out, _, messages, exited = await _all(channel.attached["flood"])
        assert out == b"".join(b"%08d\n" % number * 1000 for number in range(600))
        assert messages == [{"n": number} for number in range(600)]
        assert exited == Exited(exit_code=0)
        channel.close()


async def test_a_displaced_client_is_told_so(guest: Guest) -> None:
    first = await guest.connect()
    process = await _task(first, "sleep")
    await _pid(process)
    second = await guest.connect()
    async with asyncio.timeout(5):
        assert "displaced" in await first.wait_lost()
    assert (await _all(process))[3].cause == "lost"
    with pytest.raises(Unavailable, match="displaced"):
        await _task(first, "sleep")
    await second.attached[process.id].cancel(0)
    assert (await _all(second.attached[process.id]))[3].cause == "cancel"
    second.close()


async def test_processes_go_on_without_a_client(guest: Guest) -> None:
    channel = await guest.connect()
    process = await channel.start(
        ProcessSpec(id="p", kind="argv", argv=("sh", "-c", "read line < gate; echo $line; echo done > result"))
    )
    os.mkfifo(guest.workspace / "gate")
    channel.close()
    await asyncio.to_thread((guest.workspace / "gate").write_text, "on\n")
    channel = await guest.connect(resume={process.id: 0})
    out, _, _, exited = await _all(channel.attached["p"])
    assert (out, exited.exit_code) == (b"on\n", 0)
    assert (guest.workspace / "result").read_text() == "done\n"
    channel.close()


async def test_an_unacknowledged_exit_is_told_again(guest: Guest) -> None:
    channel = await guest.connect()
    process = await _task(channel, "code", code=5)
    frames = process.frames()
    assert await anext(frames) == Exited(exit_code=5)
    channel.close()
    channel = await guest.connect()
    assert (await _all(channel.attached[process.id]))[3] == Exited(exit_code=5)
    channel.close()
    channel = await guest.connect()
    assert channel.attached == {}
    channel.close()


async def test_an_id_is_free_again_when_the_end_has_been_taken(channel: Channel) -> None:
    for code in (1, 2):
        process = await channel.start(ProcessSpec(id="again", task={"do": "code", "code": code}))
        assert (await _all(process))[3].exit_code == code


async def test_a_start_that_is_not_waited_for_is_undone(channel: Channel) -> None:
    starting = asyncio.ensure_future(channel.start(ProcessSpec(id="x", task={"do": "sleep"})))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    # Its exit frame is taken by nobody but the channel, and then its id is free.
    async with asyncio.timeout(5):
        while not await _starts(channel, "x"):
            await run_through(channel)


async def _starts(channel: Channel, ident: str) -> bool:
    try:
        process = await channel.start(ProcessSpec(id=ident, task={"do": "code", "code": 0}))
    except Conflict:
        return False
    return (await _all(process))[3].exit_code == 0


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" * 4, protocol.frame(protocol.HELLO, 0, 0, b"{"), b""])
async def test_noise_on_the_socket_disturbs_nobody(guest: Guest, channel: Channel, noise: bytes) -> None:
    for _ in range(12):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(guest.path))
            client.sendall(noise)
    assert (await run_through(channel)).exit_code == 0


# Ends


async def test_sigterm_ends_everything_in_good_order(guest: Guest, channel: Channel) -> None:
    process = await _task(channel, "sleep")
    pid = await _pid(process)
    guest.process.terminate()
    exited = (await _all(process))[3]
    assert (exited.cause, exited.signal) == ("cancel", signal.SIGTERM)
    assert await channel.wait_lost() == "stopped"
    assert await guest.ended() == 0
    assert not _lives(pid)
    assert not guest.path.exists()


async def test_a_supervisor_that_nobody_comes_back_to_ends(boot: Boot) -> None:
    guest = boot(orphan_timeout="0.2", stop_grace="0.1")
    channel = await guest.connect()
    pid = await _pid(await _task(channel, "sleep"))
    channel.close()
    assert await guest.ended() == 0
    assert not _lives(pid)


async def test_a_supervisor_that_is_killed_takes_its_trees_along(guest: Guest, channel: Channel) -> None:
    process = await _task(channel, "sleep")
    pid, zygote = await _pid(process), guest.zygote()
    handles = [os.pidfd_open(pid), os.pidfd_open(zygote)]
    guest.process.kill()
    assert (await _all(process))[3].cause == "lost"
    for handle in handles:
        await _readable(handle)
        os.close(handle)


async def _readable(handle: int) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(handle, event.set)
    try:
        async with asyncio.timeout(5):
            await event.wait()
    finally:
        loop.remove_reader(handle)


async def test_a_zygote_that_is_killed_is_replaced(guest: Guest, channel: Channel) -> None:
    process = await _task(channel, "sleep")
    await _pid(process)
    os.kill(guest.zygote(), signal.SIGKILL)
    # A start may meet the zygote, or a process that it has just forked, in its last moments; the one after that works.
    outcomes = [await run_through(channel) for _ in range(3)]
    assert outcomes[-1] == Exited(exit_code=0)
    await process.cancel(0)
    assert (await _all(process))[3].cause == "cancel"


async def test_a_tree_ends_with_its_shim(channel: Channel) -> None:
    process = await _task(channel, "sleep")
    pid = await _pid(process)
    os.kill(_parent(pid), signal.SIGKILL)
    exited = (await _all(process))[3]
    assert (exited.exit_code, exited.signal) == (None, None)
    assert (exited.cause, "shim" in exited.detail) == ("unknown", True)
    assert not _lives(pid)
    assert (await run_through(channel)).exit_code == 0


_STOPS_ITS_SHIM = """
import os, signal, time
os.kill(os.getppid(), signal.SIGSTOP)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("asked", ["deadline", "cancel"])
async def test_a_tree_that_has_stopped_its_shim_is_ended_all_the_same(
    guest: Guest, channel: Channel, asked: str
) -> None:
    deadline = 0.3 if asked == "deadline" else None
    words = (sys.executable, "-c", _STOPS_ITS_SHIM)
    process = await channel.start(
        ProcessSpec(id=f"t{next(_ids)}", kind="argv", argv=words, deadline=deadline, grace=0.1)
    )
    pid = await _pid(process)
    if asked == "cancel":
        os.kill(guest.zygote(), signal.SIGSTOP)
        await process.cancel(0.1)
    exited = (await _all(process))[3]
    assert (exited.cause, "killed" in exited.detail) == (asked, True)
    assert not _lives(pid)
    assert (await run_through(channel)).exit_code == 0


async def test_a_supervisor_that_ends_does_not_wait_for_a_shim_that_was_stopped(guest: Guest, channel: Channel) -> None:
    process = await _task(channel, "sleep")
    pid = await _pid(process)
    os.kill(_parent(pid), signal.SIGSTOP)
    guest.process.terminate()
    assert await guest.ended() == 0
    assert not _lives(pid)


async def test_running_out_of_descriptors_fails_starts_and_nothing_else(boot: Boot) -> None:
    guest = boot(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80)))
    channel = await guest.connect()
    processes = [await _task(channel, "sleep") for _ in range(20)]
    for process in processes:
        await process.cancel(0)
    ends = [(await _all(process))[3] for process in processes]
    assert {end.detail for end in ends if end.cause == "exit"} == {
        "the process could not be started: Too many open files"
    }
    assert any(end.cause == "cancel" for end in ends)
    again = await guest.connect()
    assert (await run_through(again)).exit_code == 0
    again.close()


def _interpreter(minor: int) -> str | None:
    beside = sorted(Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python3"))
    return str(beside[-1]) if beside else shutil.which(f"python3.{minor}")


@pytest.mark.parametrize("minor", range(10, 16))
async def test_any_python_of_an_image_will_do(boot: Boot, minor: int) -> None:
    python = _interpreter(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine")
    guest = boot(python=python)
    channel = await guest.connect()
    process = await _task(channel, "alternate", count=100)
    out, _, messages, exited = await _all(process)
    assert (len(out.split()), len(messages), exited) == (50, 100, Exited(exit_code=0))
    process = await _task(channel, "sleep")
    await _pid(process)
    await process.cancel(5)
    assert (await _all(process))[3].signal == signal.SIGTERM
    channel.close()
    await channel.wait_lost()


async def test_what_cannot_begin_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", "-B", str(SUPERVISOR)]
    for options, complaint in (
        ([], "no --socket"),
        (["--socket", str(tmp_path / "s"), "--colour", "red"], "unknown option"),
        (["--socket", str(tmp_path / "no" / "s"), "--home", str(tmp_path)], "No such file"),
    ):
        ended = await asyncio.to_thread(
            subprocess.run, [*command, *options], capture_output=True, text=True, check=False
        )
        assert ended.returncode != 0
        assert complaint in ended.stderr


# The worker's side


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 100,
        protocol.json_frame(protocol.WELCOME, {"version": 99}),
        protocol.frame(protocol.WELCOME, 0, 0, b"[]"),
    ],
    ids=["noise", "another version", "another shape"],
)
async def test_a_supervisor_that_talks_nonsense_is_given_up(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "s"):
        with pytest.raises(Unavailable, match="protocol"):
            await Channel.connect(tmp_path / "s")


async def test_a_supervisor_that_sends_beyond_the_window_is_given_up(tmp_path: Path) -> None:
    chunk = protocol.OFFSET.pack(0) + bytes(protocol.CHUNK)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        welcome = {"version": protocol.VERSION, "pid": 1, "next": 1, "processes": []}
        writer.write(protocol.json_frame(protocol.WELCOME, welcome) + protocol.frame(protocol.STARTED, 1))
        with contextlib.suppress(ConnectionError):
            for sequence in range(1, 1000):
                writer.write(protocol.frame(protocol.STDOUT, 1, sequence, chunk))
                await writer.drain()
            await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "s"):
        channel = await Channel.connect(tmp_path / "s")
        with contextlib.suppress(Unavailable):
            await channel.start(ProcessSpec(id="x"))
        async with asyncio.timeout(5):
            assert "window" in await channel.wait_lost()


async def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        await Channel.connect(tmp_path / "s", ready_within=0.05)
