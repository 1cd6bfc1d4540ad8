"""What others tell a worker: the orders of control, and the news that a run is to end, or has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.log import RUN
from bus.services.execs import ExecOrder, KillRequest
from bus.services.workspaces import StopOrder
from helmr import subjects
from helmr.errors import HelmrError
from helmr.subjects import Scope
from worker.execs import Execs
from worker.executions import Executions
from worker.hot import HotRuns
from worker.machines import Machines

_EVERYWHERE = Scope("*", "*")


class Orders:
    """Hears them for one worker, has them carried out, and answers."""

    def __init__(
        self, nc: Nats, executions: Executions, machines: Machines, hot: HotRuns, execs: Execs, *, worker_id: str
    ) -> None:
        self._nc = nc
        self._executions = executions
        self._machines = machines
        self._hot = hot
        self._execs = execs
        self._worker_id = worker_id
        self._answering: set[asyncio.Task[None]] = set()

    async def hear_news(self) -> None:
        """Heed from now on what is said about runs."""
        await self._nc.subscribe(subjects.live(_EVERYWHERE, "run", "*", "cancel_requested"), cb=self._on_cancel)
        await self._nc.subscribe(subjects.live(_EVERYWHERE, "run", "*", "cancelled"), cb=self._on_ended)

    async def hear_orders(self) -> None:
        """Carry out from now on what control orders."""
        heard = {"stop": self._on_stop, "delete": self._on_delete, "exec": self._on_exec, "exec-kill": self._on_kill}
        for order, listener in heard.items():
            await self._nc.subscribe(subjects.worker(self._worker_id, order), cb=listener)

    async def _on_cancel(self, msg: Msg) -> None:
        execution = self._executions.get(subjects.parse_event(msg.subject).id)
        if execution is not None:
            execution.heed_cancel(RUN.decode(msg.data).state)

    async def _on_ended(self, msg: Msg) -> None:
        await self._hot.park(subjects.parse_event(msg.subject).id)

    async def _on_delete(self, msg: Msg) -> None:
        order = msgspec.json.decode(msg.data, type=StopOrder)
        await _answer(msg, self._machines.delete(Scope(order.project, order.environment), order.id))

    async def _on_stop(self, msg: Msg) -> None:
        await _answer(msg, self._stop_workspace(msgspec.json.decode(msg.data, type=StopOrder)))

    async def _stop_workspace(self, order: StopOrder) -> None:
        await self._hot.park_workspace(order.id)
        await self._machines.stop(Scope(order.project, order.environment), order.id, "stopped on request")

    async def _on_exec(self, msg: Msg) -> None:
        order = msgspec.json.decode(msg.data, type=ExecOrder)
        # The next one need not wait until this one is in the log.
        task = asyncio.create_task(_answer(msg, self._execs.accept(order)))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _on_kill(self, msg: Msg) -> None:
        await _answer(msg, self._execs.kill(msgspec.json.decode(msg.data, type=KillRequest)))


async def _answer(msg: Msg, work: Awaitable[Any]) -> None:
    """Do what was ordered, and say what came of it, or why nothing did."""
    try:
        result = await work
    except HelmrError as error:
        await msg.respond(msgspec.json.encode({"error": error.to_dict()}))
    else:
        await msg.respond(msgspec.json.encode({"result": result}))
