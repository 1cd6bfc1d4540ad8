"""Which processes of waiting runs are kept, and which are parked before their time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest

from helmr.errors import Conflict, HelmrError
from helmr.events import RunSpec
from helmr.subjects import Scope
from worker.engine import Exited, Frame, Machine, Process
from worker.host import memory_is_short
from worker.hot import HotRun, HotRuns
from worker.machines import Machines

pytestmark = pytest.mark.anyio
_LONG = 3600.0


class _Process:
    """A process that ends when it is told to."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.ended = asyncio.Event()

    async def cancel(self, grace: float) -> None:
        assert grace == 0
        self.ended.set()

    def settle_as_taken(self) -> None:
        pass

    async def frames(self) -> AsyncIterator[Frame]:
        await self.ended.wait()
        yield Exited(cause="cancel")


class _Machines:
    """Machines of which those in ``refused`` cannot be stopped."""

    def __init__(self, refused: dict[str, HelmrError] | None = None) -> None:
        self.stopped: list[str] = []
        self._refused = refused or {}

    async def stop(self, _scope: Scope, workspace_id: str, _reason: str) -> None:
        if workspace_id in self._refused:
            raise self._refused[workspace_id]
        self.stopped.append(workspace_id)


class _Kept:
    """A run that waits, its process and the machine it is in."""

    def __init__(self, number: int, *, park_after: float = _LONG) -> None:
        self.process = _Process(f"run_{number}")
        self.left = asyncio.Event()
        spec = RunSpec(
            session_id="ses_1", workspace_id=f"ws_{number}", deployment_id="d", deployment_version="1", task_id="t"
        )
        self.run = HotRun(
            scope=Scope("acme", "dev"),
            run_id=self.process.id,
            spec=spec,
            process=cast("Process", self.process),
            machine=cast("Machine", None),
            use=self._use(),
            park_at=asyncio.get_running_loop().time() + park_after + number,
        )

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[Machine]:
        yield cast("Machine", None)
        self.left.set()

    async def kept_in(self, hot: HotRuns) -> _Kept:
        """Itself, kept."""
        await self.run.use.__aenter__()
        hot.keep(self.run)
        return self


@asynccontextmanager
async def _hot(machines: _Machines, *, limit: int = 10, short: asyncio.Event | None = None) -> AsyncIterator[HotRuns]:
    """Kept processes that are watched."""
    is_short = short.is_set if short is not None else lambda: False
    hot = HotRuns(cast("Machines", machines), limit=limit, is_short=is_short, look=0.01)
    watching = asyncio.create_task(hot.watch())
    try:
        yield hot
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _parked(kept: _Kept) -> None:
    async with asyncio.timeout(60):
        await kept.process.ended.wait()
        await kept.left.wait()


async def test_a_process_is_kept_for_its_time_and_no_longer() -> None:
    machines = _Machines()
    async with _hot(machines) as hot:
        stays = await _Kept(1).kept_in(hot)
        goes = await _Kept(0, park_after=0).kept_in(hot)
        await _parked(goes)
        assert not stays.process.ended.is_set()
        assert hot.take("run_1") is stays.run
        assert hot.take("run_0") is None


async def test_of_too_many_the_one_that_would_go_first_goes() -> None:
    async with _hot(_Machines(), limit=2) as hot:
        kept = [await _Kept(number).kept_in(hot) for number in (2, 0, 1)]
        await _parked(kept[1])
        assert len(hot) == 2
        assert [each.process.ended.is_set() for each in kept] == [False, True, False]


async def test_all_go_when_memory_becomes_short_whatever_happens_otherwise() -> None:
    short = asyncio.Event()
    async with _hot(_Machines(), short=short) as hot:
        kept = [await _Kept(number).kept_in(hot) for number in range(3)]
        await asyncio.sleep(0)
        assert len(hot) == 3
        short.set()
        for each in kept:
            await _parked(each)
        late = await _Kept(3).kept_in(hot)
        await _parked(late)


async def test_a_worker_that_drains_keeps_nothing_any_more() -> None:
    machines = _Machines()
    async with _hot(machines) as hot:
        kept = [await _Kept(number).kept_in(hot) for number in range(3)]
        await hot.close()
        assert [each.process.ended.is_set() for each in kept] == [True] * 3
        late = await _Kept(3).kept_in(hot)
        await _parked(late)
    assert sorted(machines.stopped[:3]) == ["ws_0", "ws_1", "ws_2"]


async def test_only_the_runs_of_a_workspace_go_with_it() -> None:
    async with _hot(_Machines()) as hot:
        one, other = await _Kept(1).kept_in(hot), await _Kept(2).kept_in(hot)
        await hot.park_workspace("ws_1")
        assert (one.process.ended.is_set(), other.process.ended.is_set()) == (True, False)
        await hot.park("run_none")
        assert [run.run_id for run in hot.each()] == ["run_2"]


@pytest.mark.parametrize("error", [Conflict("a run executes in it"), HelmrError("the engine is away")])
async def test_a_machine_that_cannot_be_stopped_keeps_no_other_from_being_parked(error: HelmrError) -> None:
    machines = _Machines({"ws_0": error})
    async with _hot(machines) as hot:
        kept = [await _Kept(number).kept_in(hot) for number in range(2)]
        await hot.close()
        for each in kept:
            await _parked(each)
    assert machines.stopped == ["ws_1"]


@pytest.mark.parametrize(
    ("told", "short"),
    [
        ("MemTotal: 1000 kB\nMemAvailable: 99 kB\n", True),
        ("MemTotal: 1000 kB\nMemAvailable: 100 kB\n", False),
        ("MemTotal: 1000 kB\n", False),
        ("what", False),
        (None, False),
    ],
)
def test_memory_is_short_below_a_tenth_and_not_when_nobody_knows(tmp_path: Path, told: str | None, short: bool) -> None:
    if told is not None:
        (tmp_path / "meminfo").write_text(told)
    assert memory_is_short(tmp_path / "meminfo") is short
