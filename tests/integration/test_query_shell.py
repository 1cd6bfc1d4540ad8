"""The shell of ``helmr query``, on a terminal, over a history of eight runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats

from bus.setup import ensure_topology
from tests.integration.history import history, publish
from tests.lives import lives
from tests.terminal import Terminal, helmr_on_terminal

pytestmark = pytest.mark.anyio

PROMPT, MORE = "helmr> ", "   ...> "


@pytest.fixture
async def shell(nc: Nats, tmp_path: Path) -> AsyncIterator[Terminal]:
    """A shell that has said its first prompt, in a project with one saved query."""
    await ensure_topology(nc)
    for life in lives(8):
        await publish(nc, life.published())
    folder = tmp_path / "project"
    (folder / "queries").mkdir(parents=True)
    (folder / "helmr.toml").write_text('project = "acme"\n')
    (folder / "queries" / "states.sql").write_text(
        "-- How runs stand\nselect status, count(*) n from runs group by all"
    )
    url = nc.connected_url
    assert url is not None
    env = {"HELMR_URL": f"nats://{url.hostname}:{url.port}", "HELMR_HOME": str(tmp_path / "home")}
    async with history(nc, tmp_path / "h"), helmr_on_terminal(["query"], env, folder) as terminal:
        await terminal.see(PROMPT)
        yield terminal


async def test_statements_over_several_lines_are_answered(shell: Terminal) -> None:
    shell.type("select count(*) as all_runs\n")
    await shell.see(MORE)
    shell.type("from runs;\n")
    answer = await shell.see(PROMPT)
    assert "all_runs" in answer
    assert "\n8" in answer
    assert "1 row" in answer


async def test_an_error_points_at_its_place_and_the_shell_goes_on(shell: Terminal) -> None:
    shell.type("select id from runz;\n")
    answer = await shell.see(PROMPT)
    assert "error: there is no table 'runz' here" in answer
    assert "  select id from runz\r\n                 ^" in answer
    assert "did you mean 'runs'?" in answer
    shell.type(".format jsonl\nselect 1 as one;\n")
    await shell.see('{"one":1}')


async def test_tab_completes_tables_columns_and_commands(shell: Terminal) -> None:
    shell.type("select count(*) as n from hourly\t;\n")
    await shell.see("from hourly_runs")
    await shell.see(PROMPT)
    shell.type("select runs.deployment_v\t from runs limit 0;\n")
    await shell.see("runs.deployment_version")
    await shell.see(PROMPT)
    shell.type(".sch\t\n")
    await shell.see(".schema")


async def test_commands(shell: Terminal) -> None:
    for typed, told in (
        (".help", ".tables          tables and views"),
        (".tables", "task_health"),
        (".schema versions", "bytes of all files"),
        (".queries", "How runs stand"),
        (".run states", "succeeded"),
        (".limit 3", PROMPT),
        ("from range(10);", "3 rows"),
        (".format xml", "error: no such format: 'xml'"),
        (".schema nope", "error: there is no table 'nope' here"),
        (".nope", "error: no such command: .nope"),
    ):
        shell.type(f"{typed}\n")
        await shell.see(told)
    shell.type(".quit\n")
    assert await shell.end() == 0


async def test_ctrl_c_drops_what_is_typed_and_ctrl_d_leaves(shell: Terminal, tmp_path: Path) -> None:
    shell.type("select nonsense\n")
    await shell.see(MORE)
    await shell.press("\x03", PROMPT)
    shell.type("select 1 as fine;\n")
    assert "error" not in await shell.see(PROMPT)
    shell.type("\x04")
    assert await shell.end() == 0
    remembered = tmp_path / "home" / "query-history"
    assert "select 1 as fine;" in remembered.read_text().splitlines()
    assert remembered.stat().st_mode & 0o077 == 0


async def test_ctrl_c_ends_the_wait_for_an_answer(shell: Terminal) -> None:
    shell.type("select count(*) from range(1000000000000);\n")
    await shell.see("asking")
    shell.type("\x03")
    await shell.see("interrupted")
    await shell.see(PROMPT)
