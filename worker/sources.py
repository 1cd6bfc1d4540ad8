"""The source trees of deployments on this worker: fetched once, unpacked once, by content hash."""

from __future__ import annotations

import asyncio
import compileall
import py_compile
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from bus.artifacts import ArtifactStore
from helmr.models import Deployment
from helmr.project import unpack


class Sources:
    """A folder of unpacked deployment archives."""

    def __init__(self, artifacts: ArtifactStore, folder: Path) -> None:
        self._artifacts = artifacts
        self._folder = folder
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        folder.mkdir(parents=True, exist_ok=True)

    async def tree(self, deployment: Deployment) -> Path:
        """The unpacked archive of a deployment.

        Raises:
            NotFound: the artifact store does not have it.
        """
        final = self._folder / deployment.content_hash
        async with self._locks[deployment.content_hash]:
            if not final.exists():
                await self._fetch(deployment.archive, final)
        return final

    async def _fetch(self, digest: str, final: Path) -> None:
        scratch = Path(tempfile.mkdtemp(dir=self._folder, prefix=".fetch-"))
        try:
            archive = scratch / "archive.tar.gz"
            await self._artifacts.get(digest, archive)
            await asyncio.to_thread(unpack, archive.read_bytes(), scratch / "tree")
            await asyncio.to_thread(_compile, scratch / "tree")
            try:
                (scratch / "tree").replace(final)
            except OSError:
                if not final.exists():  # another worker of this host may have been quicker
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _compile(tree: Path) -> None:
    """Spare tasks the compiling, where their Python is ours; they need not compare either, for a tree never changes."""
    compileall.compile_dir(tree, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
