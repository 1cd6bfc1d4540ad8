"""``helmr workspace exec`` and ``shell`` as people and scripts use them: processes of their own, on pipes or a terminal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from tests.integration.platform import Platform
from tests.terminal import Terminal, helmr_on_terminal

pytestmark = pytest.mark.anyio

TASKS = """
    from helmr import task

    @task("nothing")
    def nothing() -> None: ...
"""
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
async def workspace(helmr: AsyncClient) -> str:
    return (await (await helmr.sessions.start("nothing")).run.wait(timeout=60)).workspace_id


@pytest.fixture
def environment(platform: Platform, helmr: AsyncClient) -> dict[str, str]:
    project = {"HELMR_PROJECT": helmr.scope.project, "HELMR_ENV": helmr.scope.environment}
    return {"HELMR_URL": platform.server.url, "HELMR_HOME": str(platform.home), **project}


async def _start(environment: dict[str, str], *words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=_ROOT,
        env={**os.environ, **environment},
    )


async def _helmr(environment: dict[str, str], *words: str, stdin: bytes = b"") -> tuple[bytes, bytes, int | None]:
    process = await _start(environment, *words)
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate(stdin)
    return stdout, stderr, process.returncode


async def test_bytes_and_the_exit_code_pass_through(environment: dict[str, str], workspace: str) -> None:
    data = os.urandom(3_000_000)
    script = "cat; echo aside >&2; exit 42"
    done = await _helmr(environment, "workspace", "exec", workspace, "--", "sh", "-c", script, stdin=data)
    assert done == (data, b"aside\n", 42)


async def test_a_signal_passes_through(environment: dict[str, str], workspace: str) -> None:
    script = "trap 'echo bye; exit 3' INT; echo ready; sleep 600 & wait"
    process = await _start(environment, "workspace", "exec", workspace, "--", "sh", "-c", script)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert await process.stdout.read() == b"bye\n"
        assert await process.wait() == 3


async def test_a_reader_that_goes_ends_it(environment: dict[str, str], helmr: AsyncClient, workspace: str) -> None:
    process = await _start(environment, "workspace", "exec", workspace, "--", "yes")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readexactly(1000)
        process._transport.close()  # type: ignore[attr-defined]  # asyncio has no other way to close the reading end
        await process.wait()
    (newest, *_) = await helmr.workspaces.execs.list(workspace=workspace, limit=1)
    assert (await helmr.workspaces.execs.wait(newest, timeout=60)).reason == "its client went away"


async def test_what_went_wrong_is_said(environment: dict[str, str], workspace: str) -> None:
    _, stderr, code = await _helmr(environment, "workspace", "exec", workspace, "--", "no-such-program")
    assert b"cannot execute 'no-such-program': no such program" in stderr
    assert code == 127
    _, stderr, code = await _helmr(environment, "workspace", "exec", workspace, "ls", "-l")
    assert b"hint: put -- before the command" in stderr
    assert code == 2


async def test_one_that_is_detached_is_followed_waited_for_and_killed(
    environment: dict[str, str], workspace: str
) -> None:
    script = "echo begun; sleep 600"
    stdout, _, _ = await _helmr(environment, "workspace", "exec", workspace, "--detach", "--", "sh", "-c", script)
    exec_id = stdout.decode().strip()
    following = await _start(environment, "workspace", "exec", "logs", exec_id, "--follow")
    assert following.stdout is not None
    async with asyncio.timeout(60):
        assert await following.stdout.readline() == b"begun\n"
    assert (await _helmr(environment, "workspace", "exec", "kill", exec_id))[2] == 0
    assert (await _helmr(environment, "workspace", "exec", "wait", exec_id))[2] == 143
    async with asyncio.timeout(60):
        assert await following.wait() == 0


async def test_what_it_wrote_does_not_command_a_terminal(
    environment: dict[str, str], helmr: AsyncClient, workspace: str
) -> None:
    script = r"printf 'a\033]0;title\007b\n\033[31mred\033'"
    ended = (await helmr.workspaces.exec(workspace, ["sh", "-c", script])).exec
    words = ["workspace", "exec", "logs", ended.id]
    assert (await _helmr(environment, *words))[0] == b"a\x1b]0;title\x07b\n\x1b[31mred\x1b"
    async with helmr_on_terminal(words, environment, _ROOT) as terminal:
        assert await terminal.end() == 0
        await terminal.see("red\\x1b")
        assert terminal.raw == "a\\x1b]0;title\\x07b\r\n\x1b[31mred\\x1b"


async def test_a_shell_needs_a_terminal(environment: dict[str, str], workspace: str) -> None:
    _, stderr, code = await _helmr(environment, "workspace", "shell", workspace)
    assert b"needs a terminal" in stderr
    assert code == 2


async def test_a_shell_is_a_terminal_and_puts_ours_in_order(environment: dict[str, str], workspace: str) -> None:
    words = ["shell", workspace, "--env", "PS1=ready> ", "--", "sh"]
    async with helmr_on_terminal(["workspace", *words], environment, _ROOT) as terminal:
        before = terminal.settings()
        await terminal.see("ready> ")
        assert terminal.settings() != before
        terminal.type("stty size; echo $TERM\r")
        await terminal.see("40 120")
        await terminal.see("xterm-256color")
        await terminal.see("ready> ")
        terminal.type("sleep 600\r")
        await terminal.see("sleep 600")
        terminal.type("\x03")
        await terminal.see("ready> ")
        terminal.type("echo '\x1b[31mred'; exit 6\r")
        await terminal.see("red")
        assert await terminal.end() == 6
        assert terminal.settings() == before


@pytest.mark.parametrize("back", [["exec", "attach"], ["pty", "connect"]])
async def test_a_shell_is_left_and_gone_back_to(
    environment: dict[str, str], helmr: AsyncClient, workspace: str, back: list[str]
) -> None:
    words = ["shell", workspace, "--env", "PS1=ready> ", "--", "sh"]
    async with helmr_on_terminal(["workspace", *words], environment, _ROOT) as terminal:
        before = terminal.settings()
        await terminal.see("ready> ")
        terminal.type("here=still\r")
        await terminal.see("ready> ")
        terminal.type("~d")
        await terminal.see("helmr workspace exec attach pty_")
        assert await terminal.end() == 0
        assert terminal.settings() == before
    (pty, *_) = await helmr.workspaces.execs.list(workspace=workspace, limit=1)
    async with helmr_on_terminal(["workspace", *back, pty.id], environment, _ROOT) as terminal:
        await terminal.see("here=still")
        await _go_on(terminal, pty.id, helmr)


async def test_a_terminal_is_made_resized_and_ended_by_its_id(environment: dict[str, str], workspace: str) -> None:
    script = 'trap "stty size; exit 3" WINCH; stty size; sleep 600 & wait'
    size = ["--rows", "30", "--columns", "100"]
    stdout, _, _ = await _helmr(environment, "workspace", "pty", "create", workspace, *size, "--", "sh", "-c", script)
    pty_id = stdout.decode().strip()
    assert pty_id.startswith("pty_")
    following = await _start(environment, "workspace", "exec", "logs", pty_id, "--follow")
    assert following.stdout is not None
    async with asyncio.timeout(60):
        assert await following.stdout.readline() == b"30 100\r\n"
    assert pty_id.encode() in (await _helmr(environment, "workspace", "pty", "list"))[0]
    size = ["--rows", "40", "--columns", "120"]
    assert (await _helmr(environment, "workspace", "pty", "resize", pty_id, *size))[2] == 0
    async with asyncio.timeout(60):
        assert await following.stdout.readline() == b"40 120\r\n"
        assert await following.wait() == 0
    assert (await _helmr(environment, "workspace", "exec", "wait", pty_id))[2] == 3
    assert b"has ended already" in (await _helmr(environment, "workspace", "pty", "close", pty_id))[1]
    assert (await _helmr(environment, "workspace", "pty", "resize", pty_id, *size))[2] == 6


async def test_only_terminals_are_connected_to(environment: dict[str, str], helmr: AsyncClient, workspace: str) -> None:
    plain = (await helmr.workspaces.exec(workspace, ["true"])).exec
    _, stderr, code = await _helmr(environment, "workspace", "pty", "connect", plain.id)
    assert (code, b"has no terminal" in stderr) == (2, True)
    assert plain.id.encode() not in (await _helmr(environment, "workspace", "pty", "list"))[0]


async def test_a_workspace_comes_to_life_without_a_run(environment: dict[str, str], helmr: AsyncClient) -> None:
    made = await helmr.workspaces.create(task="nothing")
    stdout, _, code = await _helmr(environment, "workspace", "materialize", made.id)
    live = await helmr.workspaces.get(made.id)
    assert (code, stdout.decode().strip(), live.state) == (0, live.worker, "live")


async def _go_on(terminal: Terminal, pty_id: str, helmr: AsyncClient) -> None:
    terminal.type('echo "$here alive"\r')
    await terminal.see("still alive")
    terminal.type("\r~.")
    assert await terminal.end() == 130
    ended = await helmr.workspaces.execs.wait(pty_id, timeout=60)
    assert ended.reason == "its client went away"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_a_shell_and_puts_the_terminal_in_order(
    environment: dict[str, str], helmr: AsyncClient, workspace: str, number: int
) -> None:
    words = ["shell", workspace, "--env", "PS1=ready> ", "--", "sh"]
    async with helmr_on_terminal(["workspace", *words], environment, _ROOT) as terminal:
        before = terminal.settings()
        await terminal.see("ready> ")
        terminal.process.send_signal(number)
        assert await terminal.end() == 130
        assert terminal.settings() == before
        assert "error:" not in terminal.text
    (pty, *_) = await helmr.workspaces.execs.list(workspace=workspace, limit=1)
    assert (await helmr.workspaces.execs.wait(pty, timeout=60)).reason == "its client went away"
