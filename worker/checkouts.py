"""The copies of workspaces' files on this host: made from a version when there is none or an old one, captured into new ones.

Beside each copy a record says which epoch of the workspace it is of, and what it looked like when it was last captured. A copy
of an earlier epoch (the workspace was restored, or has been elsewhere meanwhile) is thrown away, however complete it looks.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from bus import restore
from bus.packs import Snapshot
from bus.versions import Captured, Versions
from helmr import ids
from helmr.errors import HelmrError, Unavailable
from helmr.events import WorkspaceState
from worker import file_rights
from worker.engine import Engine, Progress
from worker.host import writing

log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """What is known about a copy."""

    epoch: int
    snapshot: Snapshot


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Checkouts:
    """The copies of one engine's host."""

    def __init__(self, engine: Engine, versions: Versions) -> None:
        self._engine = engine
        self._versions = versions
        if self.why_not is not None:
            log.warning("%s", self.why_not)

    @property
    def why_not(self) -> str | None:
        """Why versions cannot be made here; None when they can."""
        lacking = [] if self._engine.owner is None else file_rights.missing()
        if not lacking:
            return None
        return (
            "the worker may not read and write all files of workspaces: to have versions of them, run it as root, "
            f"or with {', '.join(lacking)}"
        )

    async def ready(self, state: WorkspaceState, progress: Progress) -> Record:
        """Have the workspace's files here, as of its present epoch.

        Raises:
            HelmrError: its version cannot be had, or not be written here.
            Unavailable: the artifact store does not answer.
        """
        record = Record(0, Snapshot())
        if self._path(state.id).exists() or self._aside(state.id).exists():
            record = await asyncio.to_thread(self._load, state.id)
            await asyncio.to_thread(restore.remove, self._aside(state.id))  # left by a worker that was killed
        if record.epoch == state.epoch:
            return record
        if state.manifest is not None and self.why_not is not None:
            raise HelmrError(f"workspace {state.id} cannot be restored here", hint=self.why_not)
        if state.manifest is not None:
            progress(f"restoring the files of the workspace from version {state.version}")
        return await self._make(state)

    async def capture(self, workspace_id: str, record: Record) -> Captured | Snapshot:
        """Store what has changed; see :meth:`bus.versions.Versions.capture`."""
        return await self._versions.capture(self._engine.files(workspace_id), record.snapshot)

    async def save(self, workspace_id: str, record: Record) -> None:
        """Remember what a copy looks like."""
        await asyncio.to_thread(self._save, workspace_id, record)

    async def forget(self, workspace_id: str) -> None:
        """Remove what is known about a copy that is gone."""
        self._path(workspace_id).unlink(missing_ok=True)
        await asyncio.to_thread(restore.remove, self._aside(workspace_id))

    async def _make(self, state: WorkspaceState) -> Record:
        """A fresh copy, made aside and then put in the place of the old one; killed at any point, it is made again."""
        files = self._engine.files(state.id)
        aside = self._aside(state.id)
        with writing(aside):
            draft, old = aside / ids.new("new"), aside / "old"
            draft.mkdir(parents=True)
            snapshot = await self._versions.restore(state.manifest, draft, self._engine.owner)
            draft.chmod(0o700 if self._engine.owner is None else 0o755)
            files.parent.mkdir(parents=True, exist_ok=True)
            if self._load(state.id).epoch >= state.epoch:  # we slept, and another worker of this host was quicker
                raise Unavailable(f"workspace {state.id} has been restored by another worker meanwhile")
            if files.exists():
                files.rename(old)
            draft.rename(files)
            record = Record(state.epoch, snapshot)
            await self.save(state.id, record)
            await asyncio.to_thread(restore.remove, aside)
        return record

    def _aside(self, workspace_id: str) -> Path:
        return self._engine.files(workspace_id).parent.parent / "restoring" / workspace_id

    def _path(self, workspace_id: str) -> Path:
        return self._engine.files(workspace_id).parent.parent / "versions" / workspace_id

    def _load(self, workspace_id: str) -> Record:
        """What is known; a copy without a record is of the first epoch, as all were before there were versions."""
        try:
            return _decoder.decode(self._path(workspace_id).read_bytes())
        except FileNotFoundError:
            return Record(0, Snapshot())
        except msgspec.DecodeError:
            return Record(-1, Snapshot())  # written by another version of Helmr: begin from the store

    def _save(self, workspace_id: str, record: Record) -> None:
        path = self._path(workspace_id)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = path.with_name(f".{path.name}")
            draft.write_bytes(_encoder.encode(record))
            draft.replace(path)
