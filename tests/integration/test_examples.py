"""The examples do what their READMEs say, on a Helmr with the process engine."""

from __future__ import annotations

import pytest

from tests.examples import (
    EXAMPLES,
    check_hello,
    check_human_approval,
    check_nightly_digest,
    check_report,
    check_webhook_token,
    succeeded,
)
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio


async def test_hello(platform: Platform) -> None:
    await check_hello(platform)


async def test_codebase_report_of_a_folder(platform: Platform) -> None:
    root = EXAMPLES.parent / "helmr"
    run = await succeeded(platform, "codebase-report", {"path": str(root)})
    assert run.output["files"] == len(list(root.glob("**/*.py")))
    assert run.output["errors"] == 0
    assert run.output["lines"] > 1000
    await check_report(platform, run)


async def test_human_approval(platform: Platform) -> None:
    await check_human_approval(platform)


async def test_webhook_token(platform: Platform) -> None:
    await check_webhook_token(platform)


async def test_nightly_digest(platform: Platform) -> None:
    await check_nightly_digest(platform)
