"""Finds what the store of versions holds and nobody needs: what interrupted captures, deleted workspaces and old runs leave.

What is needed is read from the log and from the manifests it names. A large payload or output is needed while the log has its
run. Nothing younger than an hour counts as garbage, nor what a workspace needed that was deleted within the hour: a capture
stores its packs before the log hears of it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
from nats.aio.client import Client as Nats

from bus import topology
from bus.artifacts import Stored
from bus.log import RUN, WORKSPACE
from bus.reader import StreamReader
from bus.versions import Versions
from helmr import subjects
from helmr.errors import Unavailable

#: Seconds that something must have been of no use.
MIN_AGE = 3600.0
_KINDS = ("created", "captured", "deleted")
_BATCH = 1000
#: Seconds that reading the log may take.
_PATIENCE = 120.0


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a look into the store found."""

    garbage: tuple[Stored, ...]
    kept: int

    @property
    def size(self) -> int:
        """Bytes of the garbage."""
        return sum(each.size for each in self.garbage)


class Garbage:
    """The garbage of one store of versions."""

    def __init__(self, nc: Nats, versions: Versions, *, min_age: float = MIN_AGE) -> None:
        self._nc = nc
        self._versions = versions
        self._min_age = timedelta(seconds=min_age)

    async def find(self) -> Found:
        """Look; nothing is removed.

        Raises:
            Unavailable: the log or the store does not answer.
            NotFound, HelmrError: a manifest that is needed cannot be read; then nothing can be said about anything.
        """
        horizon = datetime.now(UTC) - self._min_age
        # First what there is, then what is needed: what is stored meanwhile is not in the list.
        stored = [each async for each in self._versions.store.all()]
        needed = await self._values()
        for digest in await self._manifests(horizon):
            needed |= {digest, *(await self._versions.manifest(digest)).packs}
        garbage = tuple(each for each in stored if each.digest not in needed and each.at < horizon)
        return Found(garbage=garbage, kept=len(stored) - len(garbage))

    async def remove(self, found: Found) -> None:
        """Remove what was found."""
        for each in found.garbage:
            await self._versions.store.delete(each.digest)

    async def _manifests(self, horizon: datetime) -> set[str]:
        """The manifests of every version of every workspace that is there, or was until a moment ago."""
        named: dict[str, set[str]] = {}
        for event in map(WORKSPACE.decode, await self._read([subjects.of_kind("workspace", kind) for kind in _KINDS])):
            if event.kind == "deleted" and event.at < horizon:
                named.pop(event.workspace_id, None)
            elif "manifest" in event.data:
                named.setdefault(event.workspace_id, set()).add(event.data["manifest"])
        return set().union(*named.values())

    async def _values(self) -> set[str]:
        """The large payloads and outputs of the runs that the log has."""
        filters = [subjects.lane("*"), subjects.of_kind("run", "held"), subjects.of_kind("run", "succeeded")]
        events = [RUN.decode(body).data for body in await self._read(filters, mark=b'_artifact":{')]
        found = [data.get("spec", {}).get("payload_artifact") or data.get("output_artifact") for data in events]
        return {reference["digest"] for reference in found if reference}

    async def _read(self, filters: list[str], *, mark: bytes = b"") -> list[bytes]:
        """What the log has under some filters, in its order; of that, what has a ``mark`` in it."""
        arrived = asyncio.Event()
        reader = StreamReader(self._nc, topology.RUNS, reader="garbage", filters=filters, arrived=arrived.set)
        reading = asyncio.create_task(reader.run())
        found: list[bytes] = []
        try:
            async with asyncio.timeout(_PATIENCE):
                while True:
                    arrived.clear()
                    found += [bytes(message.body) for message in reader.take(_BATCH) if mark in message.body]
                    if reader.caught_up.is_set() and not len(reader):
                        return found
                    if not len(reader):
                        await arrived.wait()
        except TimeoutError as error:
            raise Unavailable("the log could not be read in time") from error
        finally:
            reading.cancel()
            await asyncio.wait({reading})
