"""Parts as child processes: they come back when they die, stop when they are told to, and are gone when we are."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cli.process import Part, PartFailed
from tests.patience import eventually

pytestmark = pytest.mark.anyio

_STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)
_SERVES = "import time; print('ready', flush=True); time.sleep(60)"


def part(code: str, lines: list[str] | None = None, *, fragile: bool = False) -> Part:
    """A part that runs ``code`` and is ready when it says so."""

    def listen(line: str) -> bool:
        if lines is not None:
            lines.append(line)
        return line == "ready"

    return Part("part", lambda: [sys.executable, "-c", code], listen, fragile=fragile, died=lambda _: None)


async def test_a_part_that_is_killed_comes_back() -> None:
    serving = part(_SERVES)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serving.run())
        await serving.ready.wait()
        first = serving.pid
        serving.signal(signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: serving.restarts)
        await serving.ready.wait()
        assert serving.pid not in {None, first}
        await serving.stop(5)
    assert serving.pid is None


async def test_a_part_that_does_not_stop_is_killed() -> None:
    stubborn = part(_STUBBORN)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stubborn.run())
        await stubborn.ready.wait()
        began = time.monotonic()
        await stubborn.stop(0.2)
        assert time.monotonic() - began < 2
    assert stubborn.pid is None


async def test_a_part_that_keeps_dying_is_started_ever_later() -> None:
    dying = part("raise SystemExit(1)")
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(dying.run())
        await asyncio.sleep(1.0)
        assert 1 <= dying.restarts <= 4
        assert dying.tried.is_set()
        await dying.stop(1)
        await running


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("noise\nerror: no engine\nhint: start it", "no engine", "start it"),
        ("error: two\nlines", "two\nlines", None),
        ("Traceback\nValueError: x", "part ended with exit code 4: Traceback / ValueError: x", None),
    ],
)
async def test_a_fragile_part_that_never_was_ready_fails_with_its_own_words(
    said: str, message: str, hint: str | None
) -> None:
    failing = part(f"import sys; print({said!r}, file=sys.stderr); sys.exit(4)", fragile=True)
    with pytest.raises(PartFailed) as caught:
        await failing.run()
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, 4)


async def test_output_is_heard_line_by_line_however_it_comes() -> None:
    lines: list[str] = []
    code = "import sys; sys.stdout.write('ready\\nä' + 'x' * 200_000 + '\\nlast'); sys.stdout.buffer.write(b'\\xff')"
    talking = part(code, lines)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(talking.run())
        await asyncio.to_thread(eventually, lambda: "last\N{REPLACEMENT CHARACTER}" in lines)
        await talking.stop(1)
    assert lines[0] == "ready"
    assert len("".join(lines[1 : lines.index("last\N{REPLACEMENT CHARACTER}")])) == 200_001


def test_a_part_ends_with_its_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        textwrap.dedent(f"""
        import asyncio, sys
        from cli.process import Part
        part = Part("part", lambda: [sys.executable, "-c", {_SERVES!r}], lambda line: line == "ready")
        async def main():
            running = asyncio.create_task(part.run())
            await part.ready.wait()
            print(part.pid, flush=True)
            await running
        asyncio.run(main())
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        eventually(lambda: _has_ended(child))


def _has_ended(pid: int) -> bool:
    try:
        return "Z (" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
