"""The source trees of deployments on this worker: fetched once, unpacked once, by content hash."""

from __future__ import annotations

import asyncio
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
            try:
                (scratch / "tree").replace(final)
            except OSError:
                if not final.exists():  # another worker of this host may have been quicker
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
