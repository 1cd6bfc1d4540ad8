"""Keeps the deployment of a folder current: deploys it, watches its files, and deploys it again when they change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cli.restless import Restless
from helmr.config import load
from helmr.errors import ConfigError, HelmrError, NotFound, TimedOut, Unavailable
from helmr.index import FORMAT
from helmr.project import IGNORE_FILE, Archive, Rules, pack

if TYPE_CHECKING:
    from watchfiles import Change

    from helmr.client.aio import AsyncClient
    from helmr.config import Settings
    from helmr.models import Deployment

#: Milliseconds in which changes are gathered: editors write a file in several steps.
_DEBOUNCE = 300
#: Milliseconds after which the watcher is certain to have begun, and says so with an empty set of changes.
_WATCH_TICK = 1000
#: Seconds before another try when Helmr itself could not be reached.
_RETRY = 1.0

Deployed = Callable[["Deployment", bool], None]
Failed = Callable[[HelmrError], None]
LeftOut = Callable[[str], None]


class Redeployer:
    """Deploys ``root`` through ``client``; :meth:`run` does so for ever.

    ``deployed`` hears of every version that became current and whether it is new, ``failed`` of every state of the folder
    that cannot be deployed: the deployment before stays the current one. ``left_out`` hears of each file that changes for
    ever, once: its changes alone lead to no deployment from then on; see :mod:`cli.restless`.
    """

    def __init__(
        self,
        client: AsyncClient,
        root: Path,
        deployed: Deployed,
        failed: Failed,
        left_out: LeftOut,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._root = root
        self._deployed = deployed
        self._failed = failed
        self._left_out = left_out
        self._clock = clock
        self._restless = Restless()
        self._names: set[str] = set()
        self._changed = asyncio.Event()
        self._changed.set()
        self._seen: str | None = None

    async def run(self) -> None:
        """Deploy now and on every change."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._deploy_patiently()

    async def _watch(self) -> None:
        from watchfiles import awatch

        began = False
        watch = awatch(
            self._root,
            watch_filter=self._relevant(),
            debounce=_DEBOUNCE,
            rust_timeout=_WATCH_TICK,
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        async for changes in watch:
            # What changed before the watcher had begun is in no set of changes: look once when it has.
            names = {self._name(path) for _, path in changes} - self._restless.left_out
            self._names |= names
            if names or not began:
                self._changed.set()
            began = True

    def _name(self, path: str) -> str:
        """Relative to the folder; where the system tells of it by another path than ours, that one as it is."""
        found = Path(path)
        return (found.relative_to(self._root) if found.is_relative_to(self._root) else found).as_posix()

    def _relevant(self) -> Callable[[Change, str], bool]:
        def relevant(_: Change, path: str) -> bool:
            try:
                name = Path(path).relative_to(self._root).as_posix()
                return name == IGNORE_FILE or not Rules(self._root, load(self._root).ignore).ignores(name)
            except (HelmrError, OSError, ValueError):
                return True  # the settings are broken at this moment: deploying will say how

        return relevant

    async def _deploy_patiently(self) -> None:
        told = False
        while True:
            try:
                await self._deploy()
            except (Unavailable, TimedOut) as error:
                if not told:
                    self._failed(error)
                told = True
                await asyncio.sleep(_RETRY)  # nothing tells when a restarted part answers again
            except HelmrError as error:
                self._failed(error)
                return
            else:
                return

    async def _deploy(self) -> None:
        names, self._names = self._names, set()
        settings = load(self._root)
        archive = await asyncio.to_thread(pack, self._root, settings.ignore)
        if archive.digest == self._seen:
            return
        for name in self._restless.begins(names, self._clock()):
            self._left_out(name)
        try:
            await self._deploy_archive(settings, archive)
        finally:
            self._restless.ends(self._clock())

    async def _deploy_archive(self, settings: Settings, archive: Archive) -> None:
        scope = self._client.scope
        if settings.require_project() != scope.project:
            raise ConfigError(
                f"the project's name has changed to {settings.project}", hint="start `helmr dev` again to deploy it"
            )
        current = await self._same(archive)
        try:
            deployment = current or await self._client.deployments.deploy(self._root)
        except (Unavailable, TimedOut):
            raise
        except HelmrError:
            self._seen = archive.digest  # it will not get better by itself
            raise
        self._seen = deployment.content_hash
        self._deployed(deployment, current is None)

    async def _same(self, archive: Archive) -> Deployment | None:
        """The current deployment, if it is of these very files."""
        try:
            current = await self._client.deployments.get()
        except NotFound:
            return None
        same = current.content_hash == archive.digest and current.index.get("format") == FORMAT
        return current if same else None
