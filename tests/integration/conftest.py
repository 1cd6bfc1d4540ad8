"""Fixtures of the integration tests: one Helmr per test process, and a project of its own for each module."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from tests.conftest import SHARED
from tests.integration.platform import Platform, running
from tests.integration.supervisors import boot, channel, guest  # noqa: F401


@pytest.fixture(scope="session")
async def platform(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:  # noqa: ARG001
    """A Helmr that all tests of this process share: do it no harm. Those that must, make one with ``running``."""
    async with running(tmp_path_factory.mktemp(SHARED), slots=8) as platform:
        yield platform


@pytest.fixture(scope="module")
async def helmr(platform: Platform, request: pytest.FixtureRequest) -> AsyncClient:
    """A client of the project that has the module's ``TASKS`` deployed."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
    return await platform.project(name, request.module.TASKS)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, or of the size that the test is parametrized with."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = getattr(request, "param", "1m")
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, check=False
    )
    if mounting.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
