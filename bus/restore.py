"""Writes a version to a folder that nobody else sees yet, each chunk verified, files and folders as they were."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import zstandard

from bus.manifest import CHUNK, Entry, Manifest, Place, check
from bus.tree import FILE_MODE, Stamp
from helmr.errors import HelmrError


class Restoration:
    """One version on its way into the empty folder ``root``; ``owner`` (uid, gid) gets everything, None leaves it as it is.

    Call :meth:`begin`, then :meth:`fill` with every pack of the manifest, then :meth:`finish`.
    """

    def __init__(self, manifest: Manifest, root: Path, owner: tuple[int, int] | None) -> None:
        check(manifest)
        self._manifest = manifest
        self._root = root
        self._owner = owner
        #: By pack: where each of its chunks goes, as file and offset.
        self._wanted: defaultdict[int, dict[bytes, list[tuple[bytes, int]]]] = defaultdict(lambda: defaultdict(list))
        for entry in manifest.entries:
            for number, digest in enumerate(entry.chunks):
                if digest:
                    place = self._place(digest)
                    self._wanted[place.pack][digest].append((entry.path, number * CHUNK))

    def _place(self, digest: bytes) -> Place:
        place = self._manifest.places.get(digest)
        if place is None or place.pack >= len(self._manifest.packs):
            raise HelmrError(f"a manifest does not say where its chunk {digest.hex()[:12]} is")
        return place

    def packs(self) -> Iterable[tuple[int, str]]:
        """The packs that are needed, as number and name."""
        return [(number, self._manifest.packs[number]) for number in sorted(self._wanted)]

    def begin(self) -> None:
        """Make folders, links, and files of nothing but holes."""
        for entry in self._manifest.entries:
            path = self._path(entry)
            if entry.kind == "folder":
                path.mkdir(0o700)
            elif entry.kind == "link":
                path.symlink_to(os.fsdecode(entry.target))
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                os.ftruncate(descriptor, entry.size)
                os.close(descriptor)

    def fill(self, number: int, pack: bytes) -> None:
        """Write the chunks of one pack to where they belong.

        Raises:
            HelmrError: a chunk is not what its name says.
        """
        decompressor = zstandard.ZstdDecompressor()
        for digest, targets in self._wanted[number].items():
            data = chunk_of(pack, self._manifest.places[digest], digest, decompressor)
            for path, offset in targets:
                descriptor = os.open(self._root / os.fsdecode(path), os.O_WRONLY | os.O_NOFOLLOW)
                try:
                    os.pwrite(descriptor, data, offset)
                finally:
                    os.close(descriptor)

    def finish(self) -> dict[bytes, Stamp]:
        """Set owners, modes and times, what is inside before what it is in; the stamps of the files."""
        stamps = {}
        for entry in reversed(self._manifest.entries):
            path = self._path(entry)
            if self._owner is not None:
                os.chown(path, *self._owner, follow_symlinks=False)
            if entry.kind == "link":
                continue
            path.chmod(entry.mode & FILE_MODE if entry.kind == "file" else entry.mode)
            if entry.kind == "file":
                os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
                status = path.stat()
                stamps[entry.path] = Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return stamps

    def _path(self, entry: Entry) -> Path:
        return self._root / os.fsdecode(entry.path)


def chunk_of(pack: bytes, place: Place, digest: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes:
    """One chunk, verified.

    Raises:
        HelmrError: it is not what its name says.
    """
    try:
        data = decompressor.decompress(pack[place.offset : place.offset + place.length], max_output_size=CHUNK)
    except zstandard.ZstdError as error:
        raise HelmrError(f"chunk {digest.hex()[:12]} is damaged: {error}") from error
    if hashlib.sha256(data).digest() != digest:
        raise HelmrError(f"chunk {digest.hex()[:12]} is damaged")
    return data


def remove(folder: Path) -> None:
    """Delete a folder whatever the permissions in it; links are not followed."""
    if not folder.exists():
        return
    folder.chmod(0o700)
    for parent, names, _ in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder)
