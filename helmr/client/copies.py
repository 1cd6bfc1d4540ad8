"""Copies files into workspaces and out of them: one end of :mod:`helmr.guest.transfer` here, the other in the workspace.

The tree is packed or unpacked by a thread, with a pipe between it and the connection: memory is bounded whatever the size.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from tarfile import TarError
from typing import BinaryIO, cast

from helmr.client.exec_handle import ExecHandle
from helmr.client.execs import exit_code_of
from helmr.client.ignoring import Ignored
from helmr.errors import Conflict, HelmrError, NotFound, UsageError
from helmr.exec_frames import CHUNK
from helmr.guest import transfer
from helmr.models import Exec

_LEFT_OUT = "left out: "


def name_of(path: str) -> str | None:
    """What a copy of ``path`` is called in a folder; None for what stands for the content of a folder: ``.`` and ``x/.``."""
    last = path.rstrip("/").rpartition("/")[2]
    return None if last in {"", ".", ".."} else last


def check_source(source: Path) -> None:
    """Look whether there is something to copy, before a workspace comes to life for it.

    Raises:
        NotFound: there is nothing.
    """
    if not os.path.lexists(source):
        raise NotFound(f"there is no {source}")


def place_of(target: Path) -> tuple[Path, str]:
    """A folder that is there, and the path in it at which a copy is to be made: none to keep its name.

    Raises:
        NotFound: there is no such folder.
    """
    root, path = (target, "") if target.is_dir() else (target.parent, target.name)
    if not root.is_dir():
        raise NotFound(f"there is no folder {root}")
    return root, path


async def upload(process: ExecHandle, source: Path, *, ignore: bool) -> list[str]:
    """Send a tree to an exec that receives it; returns what was left out.

    Raises:
        HelmrError: it cannot be read here, or not be written there.
    """
    chosen = Ignored(source).chosen if ignore and source.is_dir() else None

    def pack(out: BinaryIO) -> list[str]:
        return transfer.pack(str(source), out, chosen) if chosen else transfer.pack(str(source), out)

    reading, writing = os.pipe()
    packing = asyncio.create_task(_in_thread(pack, writing, "wb"))
    listening = asyncio.create_task(_listen(process))
    try:
        try:
            await _feed(process, reading)
        finally:
            os.close(reading)  # what is packed still has nobody to read it
            await asyncio.wait({packing})
            packing.exception()  # seen, even if something else is raised
        left_out = packing.result()
        complaints = await listening
    finally:
        listening.cancel()
    _check(await process.wait(), complaints)
    return left_out + _left_out(complaints)


async def download(process: ExecHandle, root: Path, path: str, name: str | None) -> list[str]:
    """Make what an exec sends at a :func:`place <place_of>`; returns what was left out.

    Raises:
        HelmrError: it cannot be read there, or not be written here; it would have to be written elsewhere.
    """

    def unpack(source: BinaryIO) -> list[str]:
        return transfer.unpack(source, str(root), path, name, careful=True)

    reading, writing = os.pipe()
    unpacking = asyncio.create_task(_in_thread(unpack, reading, "rb"))
    try:
        complaints, given_up = await _receive(process, writing)
    finally:
        os.close(writing)
        await asyncio.wait({unpacking})
        unpacking.exception()  # seen: if it is a consequence, the cause is raised in its place
    if not given_up:
        _check(await process.wait(), complaints)
    return _left_out(complaints) + unpacking.result()


async def _in_thread(work: Callable[[BinaryIO], list[str]], end: int, mode: str) -> list[str]:
    """Do the work on one end of a pipe, which is closed after it."""

    def do() -> list[str]:
        with open(end, mode, buffering=0 if mode == "wb" else -1) as stream:
            return work(cast("BinaryIO", stream))

    try:
        return await asyncio.shield(asyncio.to_thread(do))
    except (transfer.TransferError, TarError) as error:
        raise UsageError(transfer.said(error)) from error
    except BrokenPipeError:
        return []  # the other end says why
    except OSError as error:
        raise HelmrError(transfer.said(error)) from error


async def _feed(process: ExecHandle, reading: int) -> None:
    try:
        while data := await _uninterrupted(lambda: os.read(reading, CHUNK)):
            await process.write(data)
        await process.end_input()
    except Conflict:
        return  # it has ended early, and says why


async def _uninterrupted(read: Callable[[], bytes]) -> bytes:
    """What a thread reads; a cancel waits for it: nobody may close what it reads."""
    reading = asyncio.ensure_future(asyncio.to_thread(read))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait({reading})
        raise


async def _listen(process: ExecHandle) -> str:
    """All that it complains about."""
    return b"".join([chunk.data async for chunk in process]).decode(errors="replace")


async def _receive(process: ExecHandle, writing: int) -> tuple[str, bool]:
    """What it complains about, and whether whoever unpacks has given up, for a reason of his own."""
    complaints = bytearray()
    reader_gone = False
    async for chunk in process:
        if chunk.stream == "stderr":
            complaints += chunk.data
        elif not reader_gone:
            try:
                await asyncio.to_thread(_write, writing, chunk.data)
            except BrokenPipeError:
                reader_gone = True  # it says why; what still comes is for nobody
                await process.signal(9)
    return complaints.decode(errors="replace"), reader_gone


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _check(ended: Exec, complaints: str) -> None:
    code = exit_code_of(ended)
    lines = [line for line in complaints.splitlines() if not line.startswith(_LEFT_OUT)]
    if code != 0:
        raise HelmrError(f"in the workspace: {lines[-1] if lines else f'the copy ended with exit code {code}'}")


def _left_out(complaints: str) -> list[str]:
    return [line.removeprefix(_LEFT_OUT) for line in complaints.splitlines() if line.startswith(_LEFT_OUT)]
