"""Log lines and printed output arrive in the order they were made, although they travel on different channels."""

from __future__ import annotations

import json

import pytest

from helmr.client import AsyncClient

pytestmark = pytest.mark.anyio

TASKS = """
    import logging
    import sys
    from helmr import logger, task

    @task("mixed")
    def mixed():
        for n in range(50):
            print("a", n)
            logger.info(f"b {n}")
            print("c", n, end=" ")
            logging.getLogger("library").warning("d %d", n)
            print("e", n, file=sys.stderr)
            logger.info(f"f {n}")
"""


async def test_lines_and_output_keep_their_order(helmr: AsyncClient) -> None:
    started = await helmr.sessions.start("mixed")
    said = ""
    async for chunk in helmr.runs.logs(started.run, follow=True):
        if chunk.stream == "log":
            said += "".join(f"[{json.loads(line)['message']}]" for line in chunk.data.splitlines())
        else:
            said += chunk.data.decode()
    assert said == "".join(f"a {n}\n[b {n}]c {n} [d {n}]e {n}\n[f {n}]" for n in range(50))
