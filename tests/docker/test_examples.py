"""The examples do what their READMEs say, in containers: ``codebase-report`` on the whole standard library of its image."""

from __future__ import annotations

import pytest

from tests.examples import (
    check_hello,
    check_human_approval,
    check_nightly_digest,
    check_report,
    check_webhook_token,
    succeeded,
)
from tests.integration.platform import Platform

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


async def test_hello(docker_platform: Platform) -> None:
    await check_hello(docker_platform)


async def test_codebase_report_of_the_standard_library(docker_platform: Platform) -> None:
    run = await succeeded(docker_platform, "codebase-report")
    totals = run.output
    assert totals["files"] > 1000
    assert totals["packages"] > 150
    assert totals["lines"] > 400_000
    assert totals["functions"] > 10_000
    assert totals["errors"] < totals["files"] / 50
    await check_report(docker_platform, run)


async def test_human_approval(docker_platform: Platform) -> None:
    await check_human_approval(docker_platform)


async def test_webhook_token(docker_platform: Platform) -> None:
    await check_webhook_token(docker_platform)


async def test_nightly_digest(docker_platform: Platform) -> None:
    await check_nightly_digest(docker_platform)
