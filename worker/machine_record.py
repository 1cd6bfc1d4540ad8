"""What stands beside a live machine on disk: whose it is and how it was made, for the worker that comes after a killed one.

A container's labels cannot be changed, and a machine may change hands twice: a workspace adopts one that was started ahead, and
a new worker takes over what a dead one of the same home has left. Secrets are no part of this.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from worker.engine import MachineSpec, Network

_NAME = "record.json"


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's worker; its workspace, and the claim under which it has that (none: it is nobody's yet); its network."""

    worker: str
    workspace_id: str
    claim: int
    network: Network

    @classmethod
    def of(cls, spec: MachineSpec) -> MachineRecord:
        """The record of a machine that is just being made."""
        return cls(worker=spec.worker_id, workspace_id=spec.workspace_id, claim=spec.claim, network=spec.network)


_decoder = msgspec.json.Decoder(MachineRecord)


def write(folder: Path, record: MachineRecord) -> None:
    """Have the machine of a folder be as the record says.

    Raises:
        OSError: the folder is gone, or the disk is full.
    """
    draft = folder / f".{_NAME}"
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(folder / _NAME)


def read(folder: Path) -> MachineRecord | None:
    """The record; None if there is none, or one of another version of Helmr."""
    try:
        return _decoder.decode((folder / _NAME).read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def records(machines: Path) -> dict[str, MachineRecord]:
    """The records of every machine below a folder, by the name of its own."""
    found = {path.parent.name: read(path.parent) for path in machines.glob(f"*/{_NAME}")}
    return {name: record for name, record in found.items() if record is not None}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Be the only one who takes or removes the machine of a folder, for the length of a block; false: somebody else is.

    For a moment only: nothing may be waited for meanwhile that may take long.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def seize(folder: Path, worker: str, living: set[str]) -> MachineRecord | None:
    """Make the machine of a folder ``worker``'s, if it is a workspace's and its worker is not among the ``living``.

    Returns the record as it was; None: it is not to be had.
    """
    with held(folder) as alone:
        record = read(folder) if alone else None
        if record is None or not record.workspace_id or record.worker in living:
            return None
        write(folder, msgspec.structs.replace(record, worker=worker))
        return record
