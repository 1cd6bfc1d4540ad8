"""Makes a version of a folder: reads what has changed since the one before, and packs what no version has yet."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import msgspec
import zstandard

from bus import tree
from bus.manifest import CHUNK, EMPTY, ZEROS, Entry, Manifest, Place
from bus.tree import FILE_MODE, NEVER, Seen, Stamp
from helmr.errors import HelmrError

#: Bytes of a pack, compressed, after which the next one is begun.
PACK = 8 * 1024**2
#: Bytes of one file, holes included: a file can claim to have exabytes.
MAX_FILE = 256 * 1024**3
#: Times a file is read that is written to meanwhile.
_TRIES = 3
_ZERO_CHUNK = bytes(CHUNK)


class Pack(msgspec.Struct, frozen=True):
    """Compressed chunks, one after the other."""

    digest: str
    data: bytes


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A version, and the stamps its files had: what the next one begins from."""

    manifest: Manifest = EMPTY
    stamps: dict[bytes, Stamp] = {}


def is_same(seen: Seen, before: Snapshot) -> bool:
    """Whether the look at a folder shows what the snapshot has; a file that may have changed makes it differ."""
    if len(seen.entries) != len(before.manifest.entries):
        return False
    for now, then in zip(seen.entries, before.manifest.entries, strict=True):
        if now != (then if not then.chunks else msgspec.structs.replace(then, chunks=())):
            return False
        if now.kind == "file" and (
            seen.stamps[now.path] == NEVER or seen.stamps[now.path] != before.stamps.get(now.path)
        ):
            return False
    return True


class PackMaker:
    """One version in the making: take every pack of :meth:`packs` and store it, then ask for the :attr:`snapshot`."""

    def __init__(self, root: Path, seen: Seen, before: Snapshot) -> None:
        self._root = root
        self._seen = seen
        self._before = before
        self._known: Mapping[bytes, Entry] = {e.path: e for e in before.manifest.entries if e.kind == "file"}
        self._packs: list[str] = []
        self._places: dict[bytes, Place] = {}
        self._buffer = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._snapshot: Snapshot | None = None
        #: Bytes of all packs made.
        self.stored = 0

    @property
    def snapshot(self) -> Snapshot:
        """The finished version."""
        assert self._snapshot is not None  # noqa: S101
        return self._snapshot

    def packs(self) -> Iterator[Pack]:
        """Read what has changed; a pack whenever one is full, and the last one."""
        entries = []
        for entry in self._seen.entries:
            if entry.kind != "file":
                entries.append(entry)
            elif self._unchanged(entry):
                entries.append(self._known[entry.path])
            else:
                read = yield from self._read(entry)
                if read is not None:
                    entries.append(read)
        if self._buffer:
            yield self._full()
        self._snapshot = Snapshot(manifest=self._manifest(entries), stamps=self._seen.stamps)

    def _unchanged(self, entry: Entry) -> bool:
        stamp = self._seen.stamps[entry.path]
        known = self._known.get(entry.path)
        if known is None or stamp == NEVER or stamp != self._before.stamps.get(entry.path):
            return False
        return known.mode == entry.mode

    def _read(self, entry: Entry) -> Generator[Pack, None, Entry | None]:
        """The entry with its content, read again when the file is written to meanwhile; None if it has gone."""
        for _ in range(_TRIES):
            descriptor = tree.open_file(self._root, entry.path)
            if descriptor is None:
                self._seen.stamps.pop(entry.path, None)
                return None
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                before = os.fstat(descriptor)
                chunks, size = yield from self._chunks(file, before)
                after = os.fstat(descriptor)
            entry = Entry(entry.path, "file", after.st_mode & FILE_MODE, size, after.st_mtime_ns, tuple(chunks))
            if (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (after.st_mtime_ns, after.st_ctime_ns, size):
                return entry
        self._seen.stamps[entry.path] = NEVER  # a moment of it, and the next version looks again
        return entry

    def _chunks(self, file: io.RawIOBase, status: os.stat_result) -> Generator[Pack, None, tuple[list[bytes], int]]:
        if status.st_size > MAX_FILE:
            raise HelmrError(f"a file of {status.st_size} bytes in the workspace exceeds the limit of {MAX_FILE}")
        sparse = status.st_blocks * 512 < status.st_size
        chunks: list[bytes] = []
        size = 0
        while size < status.st_size:  # no further: a file can grow as quickly as it is read
            if sparse and (hole := _hole(file.fileno(), size, status.st_size)):
                chunks.append(ZEROS)
                size += hole
                continue
            file.seek(size)
            data = _read_chunk(file, min(CHUNK, status.st_size - size))
            if not data:
                break
            size += len(data)
            if data[0] == 0 and data == _ZERO_CHUNK[: len(data)]:
                chunks.append(ZEROS)
            else:
                chunks.append(self._keep(data))
                if len(self._buffer) >= PACK:
                    yield self._full()
        return chunks, size

    def _keep(self, data: bytes) -> bytes:
        """The name of a chunk, which is packed unless it is stored already."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places and digest not in self._before.manifest.places:
            compressed = self._compressor.compress(data)
            self._places[digest] = Place(len(self._packs), len(self._buffer), len(compressed))
            self._buffer += compressed
        return digest

    def _full(self) -> Pack:
        data = bytes(self._buffer)
        self._buffer.clear()
        pack = Pack(hashlib.sha256(data).hexdigest(), data)
        self._packs.append(pack.digest)
        self.stored += len(data)
        return pack

    def _manifest(self, entries: list[Entry]) -> Manifest:
        """With the places of its own chunks, and only the packs that these are in."""
        old = self._before.manifest
        numbers: dict[str, int] = {}
        places = {}
        for digest in {chunk for entry in entries for chunk in entry.chunks if chunk}:
            mine = self._places.get(digest)
            place, pack = (mine, self._packs[mine.pack]) if mine else _look_up(old, digest)
            places[digest] = Place(numbers.setdefault(pack, len(numbers)), place.offset, place.length)
        return Manifest(entries=tuple(entries), packs=tuple(numbers), places=places)


def _look_up(manifest: Manifest, digest: bytes) -> tuple[Place, str]:
    place = manifest.places[digest]
    return place, manifest.packs[place.pack]


def _read_chunk(file: io.RawIOBase, length: int) -> bytes:
    """So many bytes, fewer only at the end of the file."""
    data = file.read(length) or b""
    while 0 < len(data) < length:
        more = file.read(length - len(data))
        if not more:
            break
        data += more
    return data


def _hole(descriptor: int, offset: int, size: int) -> int:
    """How many bytes of the chunk at ``offset`` are a hole: all of it, or none."""
    length = min(CHUNK, size - offset)
    if length <= 0:
        return 0
    try:
        data = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:  # nothing but a hole from here on
        return length
    return length if data >= offset + length else 0
