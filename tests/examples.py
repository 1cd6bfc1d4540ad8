"""Runs the examples on a Helmr of the tests, and checks what their READMEs promise."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

from bus.exposition import Address
from bus.gateway import serving
from bus.topology import SESSIONS
from helmr import subjects
from helmr.client import AsyncClient
from helmr.models import Run, StreamRecord
from tests.integration.platform import Platform, kinds, until

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


async def check_human_approval(platform: Platform) -> None:
    """A decision about another ticket is left alone; the change is made once."""
    client = await _deployed(platform, "human-approval")
    payload = {"ticket": "T-1", "file": "motd.txt", "line": "Welcome"}
    started = await client.sessions.start("human-approval", payload)
    await until(client, started.run, "waiting")
    session = client.sessions.open(started.session)
    (proposal,) = await session.output("proposals").list()
    assert (proposal.correlation_id, proposal.data["after"]) == ("T-1", "Welcome\n")
    decisions = session.input("decisions")
    await decisions.send({"approved": False, "by": "bob"}, correlation_id="T-2")
    await decisions.send({"approved": True, "by": "ada"}, correlation_id="T-1")
    run = await started.run.wait(timeout="100s")
    assert run.output == {"ticket": "T-1", "outcome": "approved by ada"}
    assert (files(platform, run) / "motd.txt").read_text() == "Welcome\n"


async def check_webhook_token(platform: Platform) -> None:
    """The builder finds its callback in the order, and the run goes on with what it posts."""
    client = await _deployed(platform, "webhook-token")
    started = await client.sessions.start("webhook-token", {"ref": "main"})
    await until(client, started.run, "waiting")
    order = json.loads((files(platform, started.run.record) / "order.json").read_text())
    async with serving(Address("127.0.0.1", 0), platform.control.log, platform.control.streams) as url:
        status = await asyncio.to_thread(_post, url + order["callback"], {"ok": True, "image": "app:1"})
    assert (order["ref"], status) == ("main", 200)
    run = await started.run.wait(timeout="100s")
    assert run.output == {"ref": "main", "built": True, "image": "app:1"}


async def check_nightly_digest(platform: Platform) -> None:
    """Each note is in one digest, each night has one."""
    client = await _deployed(platform, "nightly-digest")
    started = await client.sessions.start("nightly-digest", {"nights": 3, "pause": "300ms"})
    session = client.sessions.open(started.session)
    for note in ("water the plants", "call Ada"):
        await session.input("notes").send(note)
    run = await started.run.wait(timeout="100s")
    assert (run.status, run.failure) == ("succeeded", None)
    assert (run.output["nights"], run.output["notes"]) == (3, 2)
    digests = [record.data for record in await session.output("digests").list()]
    assert [digest["night"] for digest in digests] == [1, 2, 3]
    assert sum(digest["words"] for digest in digests) == 5


async def _deployed(platform: Platform, example: str) -> AsyncClient:
    client = await platform.client(example)
    await client.deployments.deploy(EXAMPLES / example)
    return client


def _post(url: str, data: Any) -> int:
    """The status of the answer."""
    request = urllib.request.Request(url, json.dumps(data).encode(), method="POST")  # noqa: S310  it is our own
    with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
        return int(answer.status)


def files(platform: Platform, run: Run) -> Path:
    """The folder of a run's workspace, as the host has it; of whichever engine's home."""
    # One of these; a search through all folders would run into those that just vanish.
    found = [
        path for base in ("", "engine/") if (path := platform.home / f"{base}workspaces" / run.workspace_id).exists()
    ]
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
