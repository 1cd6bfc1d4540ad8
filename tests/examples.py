"""Runs the examples on a Helmr of the tests, and checks what their READMEs promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from bus.topology import SESSIONS
from helmr import subjects
from helmr.client import AsyncClient
from helmr.models import Run, StreamRecord
from tests.integration.platform import Platform, kinds

EXAMPLES = Path(__file__).parents[1] / "examples"


async def succeeded(platform: Platform, example: str, payload: Any = None, **options: Any) -> Run:
    """Deploy an example as it is, run its task of the same name, and return the run, which must succeed."""
    client = await platform.client(example)
    await client.deployments.deploy(EXAMPLES / example)
    started = await client.sessions.start(example, payload, **options)
    run = await started.run.wait(timeout="100s")
    assert (run.status, run.failure) == ("succeeded", None)
    assert (await kinds(client, run))[:3] == ["queued", "leased", "started"]
    return run


async def check_hello(platform: Platform) -> None:
    """The greeting is returned, said and written; a second run finds the first one's note."""
    run = await succeeded(platform, "hello", {"name": "Ada"})
    assert run.output == {"greeting": "Hello, Ada!", "file": "hello.txt"}
    assert run.metadata == {"phase": "done"}
    note = files(platform, run) / "hello.txt"
    assert note.read_text() == "Hello, Ada!\n"
    again = await succeeded(platform, "hello", {"name": "Bob"}, workspace=run.workspace_id)
    assert again.workspace_id == run.workspace_id
    assert note.read_text() == "Hello, Bob!\n"


async def check_report(platform: Platform, run: Run) -> None:
    """What codebase-report returned, wrote, told and streamed fits together."""
    totals = run.output
    assert run.metadata["phase"] == "done"
    assert (run.metadata["files"], run.metadata["files_done"], run.metadata["percent"]) == (
        totals["files"],
        totals["files"],
        100,
    )
    report = json.loads((files(platform, run) / "report.json").read_text())
    assert {key: report["total"][key] for key in ("files", "errors", "lines", "functions", "classes")} == {
        key: totals[key] for key in ("files", "errors", "lines", "functions", "classes")
    }
    text = (files(platform, run) / "report.md").read_text()
    assert f"{totals['files']:,} files, {totals['lines']:,} lines" in text
    found = await records(platform, await platform.client("codebase-report"), run, "packages")
    assert [each.sequence for each in found] == list(range(1, totals["packages"] + 1))
    assert sum(each.data["lines"] for each in found) == totals["lines"]
    assert {each.data["package"]: each.data["files"] for each in found} == {
        name: each["files"] for name, each in report["packages"].items()
    }


def files(platform: Platform, run: Run) -> Path:
    """The folder of a run's workspace, as the host has it; of whichever engine's home."""
    found = list(platform.home.glob(f"**/workspaces/{run.workspace_id}"))
    assert len(found) == 1
    return found[0]


async def records(platform: Platform, client: AsyncClient, run: Run, stream: str) -> list[StreamRecord]:
    """The records of an output stream, straight from the log."""
    js = platform.nc.jetstream()
    subject = subjects.io(client.scope, run.session_id, "out", stream)
    reader = await js.subscribe(subject, stream=SESSIONS, ordered_consumer=True)
    try:
        last = (await js.get_last_msg(SESSIONS, subject)).seq
        found = []
        async for message in reader.messages:
            found.append(msgspec.json.decode(message.data, type=StreamRecord))
            if message.metadata.sequence.stream == last:
                return found
        return found
    finally:
        await reader.unsubscribe()
