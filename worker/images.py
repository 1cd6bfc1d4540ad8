"""Images for sandboxes: found, pulled or built; the base stands in for Python's where no registry answers.

An image is named by what goes into it, so that it is built once and never again until something changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from helmr.errors import Conflict, EngineUnavailable, HelmrError, ImageError
from helmr.sandbox import SECRET_RUN
from worker import base_image
from worker.container_spec import INSTALL, KIND
from worker.docker_api import DockerApi, EngineSilent, remove_container
from worker.docker_build import BuildLog, build
from worker.dockerfile import content_hash, context, context_files, dockerfile, parts
from worker.engine import BuildSecrets, ImageSpec, Progress
from worker.host import writing
from worker.secret_step import BUILD, Made, SecretStep, execute

#: Seconds a registry may take to say whether it has an image. Without a route this is what the first start waits.
REGISTRY_TIMEOUT = 20.0
#: The same where the stand-in exists already: a registry that has come back is welcome, waiting for one is not.
READY_TIMEOUT = 3.0

#: Seconds for which an image that was there counts as there: looking for it takes some 10 ms.
_FRESH = 60.0

#: The label that says what went into an image, and how much of it is its name.
_DIGEST = "helmr.image"
_KEY = 16

#: How the engine words it when no registry answers (Go's net package, and gateways in between).
_NO_ANSWER = re.compile(
    r"dial tcp|no such host|connection (refused|reset)|i/o timeout|TLS handshake|x509|proxyconnect|deadline exceeded"
    r"|request canceled|server misbehaving|unreachable|\bEOF\b|50[234]|Service Unavailable|Bad Gateway",
    re.IGNORECASE,
)


class Images:
    """The images of one engine. Calls for the same image build it once, in this process and across processes."""

    def __init__(self, api: DockerApi, home: Path, install: str) -> None:
        self._api = api
        self._install = install
        self._home = home
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stand_ins: dict[str, str] = {}  # base -> what is used in its place
        self._refused: dict[str, str] = {}  # base -> why no registry gave it: with a stand-in, asked once per process
        self._seen: dict[ImageSpec, tuple[str, float]] = {}  # its name, and when it was last known to be there

    async def ensure(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:
        """The name of the image for ``spec``; see :meth:`worker.engine.Engine.ensure_image`.

        What was there a moment ago is not looked for again: who finds it gone says so (:meth:`forget`), and asks once more.
        """
        name, at = self._seen.get(spec, ("", -math.inf))
        if time.monotonic() - at > _FRESH:
            name = await self._ensure(spec, progress, secrets)
            self._seen[spec] = name, time.monotonic()
        return name

    def forget(self) -> None:
        """Look for every image again before it is used."""
        self._seen.clear()

    async def collect(self) -> None:
        """Remove the containers that steps of dead workers run in: of living ones, the image is locked."""
        labels = [f"{INSTALL}={self._install}", f"{KIND}={BUILD}"]
        for item in await self._api.call(lambda client: client.containers(all=True, filters={"label": labels})):
            key = item["Labels"].get(_DIGEST, "")[:_KEY]
            if not self._locks[key].locked():
                descriptor = self._lock_file(key)
                try:
                    if _locked(descriptor):
                        await remove_container(self._api, item["Id"])
                finally:
                    os.close(descriptor)

    async def _ensure(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None) -> str:
        name = await self._base(spec.base, progress)
        for steps in parts(spec.steps):
            name = await self._part(msgspec.structs.replace(spec, steps=steps), name, progress, secrets)
        return name

    async def _part(self, spec: ImageSpec, base: str, progress: Progress, secrets: BuildSecrets | None) -> str:
        """The image of some steps on another; a step with secrets is one for itself."""
        details = await self._api.call(lambda client: client.inspect_image(base))
        if any(kind == "apt" for kind, *_ in spec.steps) and "helmr.base" in (details["Config"].get("Labels") or {}):
            raise ImageError(
                "there is no apt in the locally built base image, so .apt() steps cannot run",
                hint=f"make a registry reachable so that {spec.base} can be pulled, or load it with `docker load`",
            )
        step = SecretStep.parse(spec.steps[0]) if spec.steps[0][0] == SECRET_RUN else None
        text = step.text if step else dockerfile(spec, base)
        files = await asyncio.to_thread(context_files, spec)
        digest = await asyncio.to_thread(content_hash, text, details["Id"], files)
        name = f"helmr/image:{digest[:_KEY]}"
        if await base_image.exists(self._api, name):
            return name
        async with self._exclusive(digest[:_KEY]):
            if await base_image.exists(self._api, name):
                return name
            labels = {_DIGEST: digest}
            if step is not None:
                progress(f"building {name} from {base}, a step with {', '.join(step.variables)}")
                made = Made(name, labels, self._install)
                await self._execute(step, details, made, secrets, BuildLog(progress))
                return name
            progress(f"building {name} from {base}, {len(spec.steps)} steps")
            archive = await asyncio.to_thread(context, text, files)
            await build(self._api, archive, tag=name, labels=labels, progress=progress)
            return name

    async def _execute(
        self, step: SecretStep, base: dict[str, Any], made: Made, secrets: BuildSecrets | None, log: BuildLog
    ) -> None:
        if secrets is None:
            raise ImageError(
                f"building the image needs the secret {next(iter(step.variables.values()))}, which only runs are given",
                hint="start a run of a task in this sandbox first: it builds the image",
            )
        await execute(self._api, step, await secrets(), base=base, made=made, log=log)

    async def _base(self, base: str, progress: Progress) -> str:
        known = self._stand_ins.get(base, base)
        if await base_image.exists(self._api, known):
            return known
        async with self._exclusive(re.sub(r"\W", "-", base)):
            if await base_image.exists(self._api, base):
                return base
            if base_image.covers(base):
                return await self._pull_or_stand_in(base, progress)
            if (reason := await self._pull(base, REGISTRY_TIMEOUT, progress)) is not None:
                raise ImageError(
                    f"the image {base} is not on this machine and no registry answers ({reason})",
                    hint="make a registry reachable for the Docker engine, or load the image with `docker load`",
                )
            return base

    async def _pull_or_stand_in(self, base: str, progress: Progress) -> str:
        ready = await base_image.find(self._api) is not None
        if base not in self._refused:
            patience = READY_TIMEOUT if ready else REGISTRY_TIMEOUT
            reason = await self._pull(base, patience, progress)
            if reason is None:
                return base
            self._refused[base] = reason
        async with self._exclusive("base"):
            if not ready:
                progress(
                    f"no registry answers ({self._refused[base]}); building an equivalent base image locally, once"
                )
            name = self._stand_ins[base] = await base_image.ensure(self._api, progress)
            return name

    async def _pull(self, base: str, patience: float, progress: Progress) -> str | None:
        """Pull; None when done, else why no registry answers.

        Raises:
            ImageError: a registry answered, and does not have the image or will not give it.
        """
        log = BuildLog(progress)
        try:
            # A separate question first: the pull itself may rightly take minutes, an answer may not.
            await self._api.call(lambda client: client.inspect_distribution(base), patience=patience)
            progress(f"pulling {base}")
            await self._api.stream(lambda client: client.pull(base, stream=True, decode=True), log)
        except EngineSilent:
            return f"nothing within {patience:.0f}s"
        except (EngineUnavailable, Conflict):
            raise
        except HelmrError as error:
            log.error = error.message
        if log.error is None:
            return None
        if _NO_ANSWER.search(log.error):
            return log.error.rpartition(": ")[2]
        raise ImageError(
            f"the image {base} cannot be pulled: {log.error}",
            hint="check its name, and `docker login` if it is private",
        )

    @contextlib.asynccontextmanager
    async def _exclusive(self, key: str) -> AsyncIterator[None]:
        """One at a time for ``key``: tasks wait on a lock, processes on a file lock, which the kernel drops for the dead."""
        async with self._locks[key]:
            descriptor = self._lock_file(key)
            try:
                while not _locked(descriptor):  # noqa: ASYNC110 - flock has no asynchronous form, and builds take seconds
                    await asyncio.sleep(0.1)
                yield
            finally:
                os.close(descriptor)

    def _lock_file(self, key: str) -> int:
        with writing(self._home):
            (self._home / "locks").mkdir(parents=True, exist_ok=True)
            return os.open(self._home / "locks" / f"image-{key}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
