"""Processes with an input or a terminal, at the supervisor: every byte arrives, at the pace of the process, and it ends."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from helmr.guest import transfer
from tests.integration.supervisors import Guest
from worker.channel import Channel, ChannelProcess
from worker.engine import Exited, Output, ProcessSpec, Terminal

pytestmark = pytest.mark.anyio

_ids = iter(range(1_000_000))


async def _start(channel: Channel, *argv: str, **options: Any) -> ChannelProcess:
    return await channel.start(ProcessSpec(id=f"x{next(_ids)}", kind="argv", argv=argv, **options))


async def _rest(process: ChannelProcess) -> tuple[bytes, bytes, Exited]:
    written = {"stdout": b"", "stderr": b""}
    async with asyncio.timeout(60):
        async for frame in process.frames():
            if isinstance(frame, Output):
                written[frame.stream] += frame.data
    assert isinstance(frame, Exited)
    return written["stdout"], written["stderr"], frame


async def _until(process: ChannelProcess, words: bytes) -> bytes:
    """What it says, up to and including ``words``."""
    said = b""
    async with asyncio.timeout(60):
        while words not in said:
            frame = await process.next_frame()
            assert isinstance(frame, Output), said
            said += frame.data
    return said


async def test_input_reaches_the_process_and_ends(channel: Channel) -> None:
    process = await _start(channel, "cat", input=True)
    process.feed(b"one\n\0\xff")
    process.feed(b"two")
    process.end_input()
    assert await _rest(process) == (b"one\n\0\xfftwo", b"", Exited(exit_code=0))


async def test_without_input_it_is_empty(channel: Channel) -> None:
    assert (await _rest(await _start(channel, "cat")))[2].exit_code == 0


async def test_much_input_is_taken_at_the_pace_of_the_process(channel: Channel) -> None:
    data = os.urandom(3_000_000)
    process = await _start(channel, "sh", "-c", "read line; sha256sum", input=True)
    taken: list[int] = []
    changed = asyncio.Event()

    def note(size: int) -> None:
        taken.append(size)
        changed.set()

    process.on_taken(note)
    process.feed(data)  # it reads no further than a line that does not come: only the pipe takes some
    async with asyncio.timeout(60):
        while not taken:
            await changed.wait()
            changed.clear()
    assert taken[-1] <= 2 * 1024 * 1024
    await process.cancel(0)
    await _rest(process)
    whole = await _start(channel, "sha256sum", input=True)
    whole.on_taken(note)
    whole.feed(data)
    whole.end_input()
    stdout, _, exited = await _rest(whole)
    assert stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert exited.exit_code == 0
    assert taken[-1] == len(data)


async def test_input_that_nobody_reads_holds_nothing_up(channel: Channel, guest: Guest) -> None:
    script = "exec <&-; echo closed; while [ ! -e go ]; do sleep 0.01; done; echo end"
    process = await _start(channel, "sh", "-c", script, input=True)
    await _until(process, b"closed\n")
    process.feed(bytes(2_000_000))
    process.end_input()
    (guest.workspace / "go").touch()
    stdout, _, exited = await _rest(process)
    assert (stdout, exited.exit_code) == (b"end\n", 0)


async def test_a_signal_reaches_the_main_process(channel: Channel) -> None:
    process = await _start(channel, "sh", "-c", "trap 'echo usr1; exit 7' USR1; echo ready; sleep 600 & wait")
    await _until(process, b"ready\n")
    process.signal(signal.SIGUSR1)
    stdout, _, exited = await _rest(process)
    assert (stdout, exited.exit_code) == (b"usr1\n", 7)


async def test_a_terminal_is_one(channel: Channel) -> None:
    script = 'test -t 0 && test -t 1 && test -t 2 && stty size; read line; echo "got $line"; stty size; exit 3'
    process = await _start(channel, "sh", "-c", script, terminal=Terminal(rows=33, columns=121))
    assert b"33 121\r\n" in await _until(process, b"33 121\r\n")
    process.resize(Terminal(rows=50, columns=90))
    process.feed(b"hello\n")
    stdout, stderr, exited = await _rest(process)
    assert stdout == b"hello\r\ngot hello\r\n50 90\r\n"
    assert (stderr, exited.exit_code) == (b"", 3)


async def test_a_terminal_passes_ctrl_c_to_the_foreground(channel: Channel) -> None:
    script = "trap 'echo interrupted; exit 9' INT; echo ready; sleep 600 & wait"
    process = await _start(channel, "sh", "-c", script, terminal=Terminal())
    await _until(process, b"ready\r\n")
    process.feed(b"\x03")
    stdout, _, exited = await _rest(process)
    assert b"interrupted" in stdout
    assert exited.exit_code == 9


async def test_a_terminal_loses_nothing_that_was_written_last(channel: Channel) -> None:
    process = await _start(channel, "sh", "-c", "seq 1 20000", terminal=Terminal())
    stdout, _, _ = await _rest(process)
    assert stdout.replace(b"\r\n", b"\n") == b"".join(b"%d\n" % number for number in range(1, 20001))


async def test_the_whole_tree_goes_with_a_cancel(channel: Channel) -> None:
    process = await _start(channel, "sh", "-c", "setsid sleep 600 & echo started; cat", input=True)
    await _until(process, b"started\n")
    await process.cancel(0)
    _, _, exited = await _rest(process)
    assert (exited.signal, exited.cause) == (signal.SIGKILL, "cancel")


async def _receive(channel: Channel, data: bytes, path: str, name: str | None) -> tuple[bytes, int | None]:
    task = {"op": "receive", "path": path, "name": name}
    process = await channel.start(ProcessSpec(id=f"x{next(_ids)}", kind="files", task=task, input=True))
    process.feed(data)
    process.end_input()
    _, stderr, exited = await _rest(process)
    return stderr, exited.exit_code


async def test_files_go_in_and_come_out(channel: Channel, guest: Guest, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "run.sh").write_text("#!/bin/sh\n")
    (source / "sub" / "run.sh").chmod(0o750)
    (source / "link").symlink_to("sub/run.sh")
    packed = io.BytesIO()
    transfer.pack(str(source), packed)
    assert await _receive(channel, packed.getvalue(), "a/b/", "source") == (b"", 0)
    arrived = guest.workspace / "a" / "b" / "source"
    assert (arrived / "sub" / "run.sh").stat().st_mode & 0o7777 == 0o750
    assert (arrived / "link").readlink() == Path("sub/run.sh")
    process = await channel.start(
        ProcessSpec(id="send", kind="files", task={"op": "send", "path": "a/b/source"}, input=True)
    )
    stdout, stderr, exited = await _rest(process)
    assert (stderr, exited.exit_code) == (b"", 0)
    transfer.unpack(io.BytesIO(stdout), str(tmp_path), "back", "source")
    assert (tmp_path / "back" / "sub" / "run.sh").read_text() == "#!/bin/sh\n"


@pytest.mark.parametrize("path", ["../x", "/etc/x", "out/x", "a/../../x"])
async def test_files_stay_in_the_workspace(channel: Channel, guest: Guest, tmp_path: Path, path: str) -> None:
    (tmp_path / "x").write_text("x")
    (guest.workspace / "out").symlink_to(tmp_path)
    packed = io.BytesIO()
    transfer.pack(str(tmp_path / "x"), packed)
    stderr, code = await _receive(channel, packed.getvalue(), path, "x")
    assert code == 1
    assert b"out" in stderr or b"not in the workspace" in stderr
