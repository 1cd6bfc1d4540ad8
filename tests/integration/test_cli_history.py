"""``helmr history``: the files of a home folder against the log below it, with the server running or not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import duckdb
import pytest

from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from cli.main import call
from helmr.connection import connected
from store.home import Home
from store.verify import compare
from tests.integration.history import projecting, publish, publish_log, rows
from tests.lives import Life, lives

pytestmark = pytest.mark.anyio


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    """A home folder whose server has stopped: eight runs are in its log, and in its history."""
    server = EmbeddedServer(tmp_path, durability="relaxed")
    await server.start()
    async with connected(server.url, name="test") as nc:
        await ensure_topology(nc)
        for life in lives(8):
            await publish(nc, life.published())
            await publish_log(nc, life.id, b"line\n")
        async with projecting(nc, tmp_path / "history") as projector:
            await projector.fresh(logs=True)
    await server.stop()
    return tmp_path


async def helmr(capsys: pytest.CaptureFixture[str], home: Path, *words: str) -> tuple[int, Any, str]:
    """Run ``helmr history …``; its exit code, the JSON on stdout and what is on stderr."""
    code = await asyncio.to_thread(call, ["history", *words, "--home", str(home), "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out) if told.out else None, told.err


async def test_verify_says_whether_history_and_log_agree(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, told = await helmr(capsys, home, "verify")
    assert (code, found["same"], found["tables"]["runs"]) == (
        0,
        True,
        {"rows": 8, "missing": 0, "extra": 0, "aged": 0},
    )
    assert "starting its NATS" in told
    with duckdb.connect(str(home / "history" / "history.db")) as con:
        con.execute("DELETE FROM events WHERE seq = 2")
    code, found, _ = await helmr(capsys, home, "verify")
    assert (code, found["same"], found["tables"]["events"]["missing"]) == (1, False, 1)


async def test_rebuild_makes_good_what_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "history" / "history.db").unlink()
    code, made, _ = await helmr(capsys, home, "rebuild")
    assert (code, made["runs"]) == (0, 8)
    assert Path(made["former"]).is_dir()
    assert (await helmr(capsys, home, "verify"))[0] == 0


async def test_verify_without_a_history_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = await helmr(capsys, tmp_path, "verify")
    assert code == 5
    assert "there is no history" in told


@pytest.mark.parametrize("name", ["export", "export.tar"])
async def test_an_export_becomes_the_history_again(home: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, made, _ = await helmr(capsys, home, "export", str(home / name))
    assert (code, made["rows"]["runs_closed"] + made["rows"]["runs_live"]) == (0, 8)
    assert (await helmr(capsys, home, "export", str(home / name)))[0] == 6
    assert (await helmr(capsys, home, "import", str(home / name)))[0] == 6
    (home / "history").rename(home / "former")
    code, _, told = await helmr(capsys, home, "import", str(home / name))
    assert code == 0, told
    assert all(
        table.missing == table.extra == 0
        for table in compare(Home(home / "former"), Home(home / "history")).tables.values()
    )
    code, found, _ = await helmr(capsys, home, "verify")
    assert (code, found["tables"]["events"]["aged"], found["tables"]["logs"]["rows"]) == (0, 0, 8)


async def test_an_export_is_kept_beside_another_log(
    home: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (await helmr(capsys, home, "export", str(home / "out")))[0] == 0
    other = tmp_path_factory.mktemp("other")
    code, _, said = await helmr(capsys, other, "import", str(home / "out"))
    assert (code, "3 cancelled" in said) == (0, True)
    compared = compare(Home(home / "history"), Home(other / "history")).tables
    assert {name for name, table in compared.items() if table.missing or table.extra} == {"runs", "attempts", "waits"}
    with duckdb.connect(str(other / "history" / "history.db"), read_only=True) as con:
        ends = "SELECT status, count(*), count(finished_at), count(pending_wait) FROM runs GROUP BY ALL ORDER BY ALL"
        assert con.execute(ends).fetchall() == [("cancelled", 4, 4, 0), ("failed", 2, 2, 0), ("succeeded", 2, 2, 0)]
        assert con.execute("SELECT count(*) FROM attempts WHERE outcome IS NULL").fetchone() == (0,)
        assert con.execute("SELECT outcome, count(*) FROM waits GROUP BY ALL ORDER BY ALL").fetchall() == [
            ("cancelled", 1),
            ("completed", 1),
        ]
    server = EmbeddedServer(other, durability="relaxed")
    await server.start()
    async with connected(server.url, name="test") as nc:
        await ensure_topology(nc)
        life = Life().queued().leased().succeeds()
        await publish(nc, life.published())
        await publish_log(nc, life.id, b"line\n")
        async with projecting(nc, other / "history") as projector:
            await projector.fresh(logs=True)
            assert rows(projector, "SELECT count(*) AS n FROM runs") == [{"n": 9}]
    await server.stop()
    code, found, _ = await helmr(capsys, other, "verify")
    assert (code, found["tables"]["runs"]) == (0, {"rows": 1, "missing": 0, "extra": 0, "aged": 8})


async def test_what_is_no_export_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, told = await helmr(capsys, home / "elsewhere", "import", str(home))
    assert code == 5
    assert "is no export" in told
