"""The documentation is about this version: links lead somewhere, commands and settings exist, examples are valid."""

from __future__ import annotations

import ast
import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

import helmr
from bus import lane_loads, manifest, packs, server, starts, topology
from bus.services import secrets
from cli import secret
from cli.main import helmr as command_line
from cli.options import Command, Flags
from helmr import declarations, durations, events, indexing, logger, metadata, project, streams, tags, tasks
from helmr.guest import failures, journal, outbox, runner
from helmr.reducers import queue as queue_rules
from helmr.reducers import run as run_rules
from helmr.reducers import workspace as workspace_rules
from store import question, sandboxes
from tests.integration.platform import Platform
from worker import container_spec, host, images, log_pump, machines, masking, process_boot

pytestmark = pytest.mark.anyio

REPOSITORY = Path(__file__).parents[2]
CONFIGURATION = REPOSITORY / "docs/reference/configuration.md"
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("examples/*/*.md")],
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_VARIABLE = re.compile(r"(?<![A-Z_])HELMR_[A-Z]+(?:_[A-Z]+)*")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All blocks in one language."""
    texts = [(page, page.read_text()) for page in PAGES]
    return [
        Block(page, text.count("\n", 0, match.start()) + 2, match[2])
        for page, text in texts
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]


def anchors(page: Path) -> set[str]:
    """What links can point at within a page, as the usual renderers name headings."""
    text = _FENCE.sub("", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def command_lines() -> Iterator[Any]:
    """Every call of ``helmr`` in a console block, as its arguments."""
    for block in blocks("console"):
        for number, line in enumerate(block.text.splitlines()):
            for call in calls(line.removeprefix("$ ")):
                yield pytest.param(call, id=f"{block.page.name}:{block.line + number} {' '.join(call)[:40]}")


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each ``helmr`` in a line of shell."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    call: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set("();<>|&"):
            yield from _arguments(call)
            call = []
        else:
            call.append(word)


def _arguments(call: list[str]) -> Iterator[list[str]]:
    while call and re.match(r"[A-Z_]+=", call[0]):
        call = call[1:]
    if call and call[0] == "helmr":
        yield call[1:]


@pytest.mark.parametrize("arguments", list(command_lines()))
def test_commands_and_their_options_exist(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Command, "invoke", lambda *_: None)
    monkeypatch.setattr(click.Path, "convert", lambda _self, value, *_: value)
    command_line.main(arguments, prog_name="helmr", standalone_mode=False, obj=Flags())


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_are_valid_and_import_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    compile(tree, str(block), "exec")
    imported = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module == "helmr"]
    for name in (alias.name for each in imported for alias in each.names):
        assert name in dir(helmr)


@pytest.mark.parametrize("block", [each for each in blocks("python") if "@task" in each.text], ids=str)
def test_task_modules_can_be_deployed(block: Block, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(block.text)
    assert indexing.index_project(tmp_path, ["tasks"]).tasks


def test_every_variable_is_documented_and_every_documented_one_is_read() -> None:
    code = [path for part in ("helmr", "bus", "worker", "store", "cli") for path in REPOSITORY.glob(f"{part}/**/*.py")]
    code += [REPOSITORY / "compose.yaml", *(path for path in REPOSITORY.glob("scripts/*") if path.is_file())]
    read = {name for path in code for name in _VARIABLE.findall(path.read_text())}
    assert set(_VARIABLE.findall(CONFIGURATION.read_text())) == read


def test_every_public_name_is_in_the_reference_of_python() -> None:
    text = (REPOSITORY / "docs/reference/python.md").read_text()
    assert [name for name in helmr.__all__ if name != "__version__" and f"`{name}" not in text] == []


@pytest.mark.parametrize("script", ["cli-reference", "history-reference"])
def test_generated_pages_are_up_to_date(script: str) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


KIB, MIB, GIB = 1024, 1024**2, 1024**3

#: Rows of the tables of limits and times, by how they begin, and what they say, as the code has it.
ROWS: list[tuple[str, str, float]] = [
    ("payload, output", "16 MiB", events.MAX_VALUE / MIB),
    ("payload, output", "512 KiB", events.INLINE_VALUE / KIB),
    ("payload, output", "16 MiB", runner.OUTPUT_LIMIT / MIB),
    ("metadata of a run", "256 KiB", metadata.LIMIT / KIB),
    ("metadata of a run", "256 KiB", starts.MAX_METADATA / KIB),
    ("tags", "10,", tags.MAX_TAGS),
    ("tags", "128 characters", tags.MAX_TAG_LENGTH),
    ("limit of a queue", "1,000", declarations.MAX_CONCURRENCY),
    ("limit of a queue", "1,000", queue_rules.MAX_HOLDERS),
    ("runs that wait in a lane", "16,", lane_loads.MIN_BACKLOG),
    ("external id", "512 characters", starts.MAX_KEY_LENGTH),
    ("record of", "256 KiB", streams.RECORD_LIMIT / KIB),
    ("line of", "64 KiB", logger.LINE_LIMIT / KIB),
    ("log of a run", "64 MiB", log_pump.LIMIT / MIB),
    ("chunk of log", "64 KiB", log_pump.CHUNK / KIB),
    ("log waiting in", "4 MiB", journal.WINDOW_BYTES / MIB),
    ("log waiting in", "4,096 frames", journal.WINDOW_FRAMES),
    ("message of", "1 MiB", outbox.MAX_MESSAGE / MIB),
    ("traceback", "60 KiB", failures.TRACEBACK_LIMIT / KIB),
    ("`max_duration`", "5 s", tasks.MIN_MAX_DURATION),
    ("`max_duration`", "5 s", starts.MIN_DURATION),
    ("`max_duration`", "24 h", tasks.MAX_MAX_DURATION / 3600),
    ("`max_duration`", "24 h", starts.MAX_DURATION / 3600),
    ("`max_duration`", "15 min", tasks.DEFAULT_MAX_DURATION / 60),
    ("leases lost in a row", "5,", run_rules.MAX_DISPATCH_ATTEMPTS),
    ("version of", "1,000,000 files", manifest.MAX_ENTRIES),
    ("version of", "200 deep", manifest.MAX_DEPTH),
    ("version of", "256 GiB", packs.MAX_FILE / GIB),
    ("value of a secret", "64 KiB", secrets.MAX_VALUE / KIB),
    ("value of a secret", "4 characters", masking.MIN_LENGTH),
    ("value of a secret", "4 characters", secret._MIN_MASKED),
    ("task project", "64 MiB", project.SIZE_LIMIT / MIB),
    ("task project", "20,000 files", project.FILE_LIMIT),
    ("importing", "60 s", indexing.TIMEOUT),
    ("query", "30 s", question.TIMEOUT),
    ("query", "5 min", question.MAX_TIMEOUT / 60),
    ("what is said of a workspace", "16 KiB", workspace_rules.MAX_METADATA / KIB),
    ("query", "10,000 rows", question.ROWS),
    ("query", "5,000,000;", question.MAX_ROWS),
    ("query", "256 MiB", question.MAX_BYTES / MIB),
    ("query", "2 at once", sandboxes.CONCURRENT),
    ("query", "64 KiB", question.MAX_SQL / KIB),
    ("stored logs", "7 days", topology.LOG_AGE / 86400),
    ("stored logs", "20 GiB", topology.LOG_BYTES / GIB),
    ("disk space", "512 MiB", host.DISK_RESERVE / MIB),
    ("disk space", "640 MiB", host.DISK_RECOVERED / MIB),
    ("free disk", "64 MiB", server.MIN_FREE_BYTES / MIB),
    ("ack deadline", "15 ", topology.ACK_WAIT / topology._PACE),
    ("heartbeat", "3 ", topology.HEARTBEAT / topology._PACE),
    ("presence", "9 ", topology.PRESENCE_TTL / topology._PACE),
    ("a silent worker", "6.5 ", topology.SUSPECT_AFTER / topology._PACE),
    ("`cancel_grace`", "10 ", tasks.DEFAULT_CANCEL_GRACE),
    ("an idle workspace", "300 ", machines.IDLE_STOP),
    ("an idle workspace", "16 idle", machines.MAX_IDLE),
    ("a container without", "60 ", container_spec.ORPHAN_TIMEOUT),
    ("a supervisor", "20 ", process_boot.ORPHAN_TIMEOUT),
    ("a registry", "20 ", images.REGISTRY_TIMEOUT),
    ("a registry", "(3)", images.READY_TIMEOUT),
]


@pytest.mark.parametrize(("row", "words", "value"), ROWS)
def test_limits_are_those_of_the_code(row: str, words: str, value: float) -> None:
    lines = [line for line in CONFIGURATION.read_text().splitlines() if line.startswith(f"| {row}")]
    assert len(lines) == 1
    assert words in lines[0]
    assert float(re.sub(r"[^\d.]", "", words)) == pytest.approx(value)


def test_durations_and_retryable_codes_are_those_of_the_code() -> None:
    text = (REPOSITORY / "docs/reference/python.md").read_text()
    shown = re.search(r"or text: (.+?)\. Where", text, re.DOTALL)
    assert shown is not None
    assert all(durations.seconds(each) > 0 for each in re.findall(r'"(.+?)"', shown[1]))
    assert all(f"`{code}`" in text for code in declarations.RETRYABLE_CODES)


async def test_any_nats_client_hears_of_failed_runs(platform: Platform, tmp_path: Path) -> None:
    client = await platform.project(
        "docs", "from helmr import task\n\n@task\ndef fail():\n    raise ValueError('no')\n"
    )
    program = next(block for block in blocks("python") if block.page.name == "subscribe.md").text
    (tmp_path / "failures.py").write_text(program)
    listener = await asyncio.create_subprocess_exec(
        sys.executable,
        tmp_path / "failures.py",
        stdout=asyncio.subprocess.PIPE,
        env={"NATS_URL": platform.server.url},
    )
    assert listener.stdout is not None
    try:
        async with asyncio.timeout(30):
            hearing = asyncio.create_task(listener.stdout.readline())
            runs = []
            while not hearing.done():  # it does not say when it has subscribed
                started = await client.sessions.start("fail")
                runs.append((await started.run.wait()).id)
            heard = (await hearing).decode().split()
    finally:
        listener.kill()
        await listener.communicate()
    assert heard[1] in runs
    assert heard[2:] == ["task_error", "no"]
