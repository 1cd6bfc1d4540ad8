"""Manifests: what a version of a workspace consists of, and where each piece of it is stored.

A file is a sequence of chunks of :data:`CHUNK` bytes, each known by the sha-256 of its content; new chunks are compressed and
gathered in packs, which are blobs of the artifact store, as the manifest itself is. A version needs its manifest and the packs
named in it, nothing else.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import zstandard

from helmr.errors import HelmrError, UsageError

FORMAT = 1
#: Bytes of a chunk: what is read, hashed and stored at once, and what a changed byte of a large file costs.
CHUNK = 4 * 1024**2
#: The chunk of nothing but zeros, of whatever length: it is not stored, and restored as a hole.
ZEROS = b""
#: Entries of a version, at most: a manifest is held in memory.
MAX_ENTRIES = 1_000_000
#: Folders within folders, at most: each level takes a descriptor while the tree is walked.
MAX_DEPTH = 200
_MAX_BYTES = 1024**3

Kind = Literal["file", "folder", "link"]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One file, folder or symbolic link; paths are bytes, relative, with ``/`` between their parts."""

    path: bytes
    kind: Kind
    mode: int = 0
    size: int = 0
    mtime_ns: int = 0  #: of files; that of a folder changes with what is in it
    chunks: tuple[bytes, ...] = ()
    target: bytes = b""  #: of links


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a chunk is: the number of its pack, and its bytes in it."""

    pack: int
    offset: int
    length: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version: entries in the order of their paths, folders before what is in them."""

    format: int = FORMAT
    entries: tuple[Entry, ...] = ()
    packs: tuple[str, ...] = ()
    places: dict[bytes, Place] = {}

    @property
    def files(self) -> int:
        """How many files."""
        return sum(entry.kind == "file" for entry in self.entries)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def below(self, path: bytes, *, deep: bool) -> list[Entry]:
        """What is in a folder, with ``deep`` also what is in folders in it; ``b""`` is the workspace itself."""
        prefix = path + b"/" if path else b""
        found = [entry for entry in self.entries if entry.path.startswith(prefix)]
        return found if deep else [entry for entry in found if b"/" not in entry.path[len(prefix) :]]


def shown(path: bytes) -> str:
    """A path as people see and write it: bytes that are no UTF-8 as ``\\xff``."""
    return path.decode(errors="backslashreplace")


EMPTY = Manifest()
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """The manifest as it is stored."""
    return zstandard.ZstdCompressor(level=1).compress(_encoder.encode(manifest))


def decode(data: bytes) -> Manifest:
    """The manifest of a stored blob, checked: nothing in it leads out of the folder it is restored to.

    Raises:
        HelmrError: it is none, or one of a later Helmr.
        UsageError: it plays tricks with paths.
    """
    try:
        manifest = _decoder.decode(zstandard.ZstdDecompressor().decompress(data, max_output_size=_MAX_BYTES))
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise HelmrError(f"a manifest cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise HelmrError(f"a manifest has format {manifest.format}; this Helmr knows {FORMAT}", hint="upgrade Helmr")
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Refuse paths that are absolute, go up, or go through anything but folders of the manifest itself.

    Raises:
        UsageError: with the path.
    """
    folders = {b""}
    seen = set()
    for entry in manifest.entries:
        parent, _, name = entry.path.rpartition(b"/")
        if name in {b"", b".", b".."} or b"\0" in entry.path or parent not in folders or entry.path in seen:
            raise UsageError(f"a manifest has an impossible path: {entry.path!r}")
        seen.add(entry.path)
        if entry.kind == "folder":
            folders.add(entry.path)
