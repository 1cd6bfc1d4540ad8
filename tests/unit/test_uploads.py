"""Receiving archives: by whoever sends one, whatever others send at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from bus.artifacts import DirectoryArtifacts, digest_of
from bus.deployments import Deployments
from bus.services.deployments import DeploymentService, UploadReply, UploadRequest
from tests.lives import SCOPE

pytestmark = pytest.mark.anyio

ARCHIVE = bytes(range(256)) * 40
NAME = digest_of(ARCHIVE)
HALF = len(ARCHIVE) // 2


class SlowArtifacts(DirectoryArtifacts):
    """A store that reads what it is given only when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def put(self, path: Path, digest: str) -> None:
        """Store a file, once ``go`` is set."""
        self.asked.set()
        await self.go.wait()
        await super().put(path, digest)


@pytest.fixture
def artifacts(tmp_path: Path) -> SlowArtifacts:
    return SlowArtifacts(tmp_path)


@pytest.fixture
def service(artifacts: SlowArtifacts) -> Iterator[DeploymentService]:
    service = DeploymentService(cast("Deployments", None), artifacts)
    yield service
    service.close()


async def part(service: DeploymentService, offset: int, end: int) -> UploadReply:
    request = UploadRequest(archive=NAME, offset=offset, data=ARCHIVE[offset:end], last=end == len(ARCHIVE))
    return await service.upload(SCOPE, request)


async def test_an_archive_that_two_send_is_stored_whole(service: DeploymentService, artifacts: SlowArtifacts) -> None:
    assert (await part(service, 0, HALF)).have == HALF
    first = asyncio.create_task(part(service, HALF, len(ARCHIVE)))
    await artifacts.asked.wait()
    second = asyncio.create_task(part(service, 0, HALF))
    await asyncio.sleep(0)  # it has begun
    artifacts.go.set()
    assert (await first).stored
    assert (await second).stored
    assert await artifacts.get_bytes(NAME) == ARCHIVE


async def test_whoever_was_overtaken_is_told_where_to_go_on(
    service: DeploymentService, artifacts: SlowArtifacts
) -> None:
    artifacts.go.set()
    await part(service, 0, HALF)
    await part(service, 0, 10)
    reply = await part(service, HALF, len(ARCHIVE))
    assert (reply.have, reply.stored) == (10, False)
    assert (await part(service, reply.have, len(ARCHIVE))).stored
    assert await artifacts.get_bytes(NAME) == ARCHIVE
