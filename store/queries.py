"""Answers users' SQL over request/reply: the ``query`` verb of the history service, whose results come in parts.

The answer to a ``query`` request comes as several messages on the reply subject: each carries ``Helmr-Part`` (from 0), the
last one ``Helmr-End`` (how many parts), ``Helmr-Rows`` and, if a cap cut the result off, ``Helmr-Truncated``. The bodies put
together are an Arrow IPC stream, or JSON lines. An error comes as one message, like those of every other service.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from helmr import subjects
from helmr.errors import HelmrError, UsageError
from helmr.subjects import Scope
from store.projector import Projector
from store.question import QueryRequest

log = logging.getLogger(__name__)

#: The queue group of the history services.
QUERY_NAME = "helmr-history"

PART, END_HEADER, ROWS_HEADER, TRUNCATED = "Helmr-Part", "Helmr-End", "Helmr-Rows", "Helmr-Truncated"


class Queries:
    """The service, over the SQL of a store."""

    def __init__(self, projector: Projector) -> None:
        self.projector = projector
        self.sql = projector.store.sql(projector)
        self._tasks: asyncio.TaskGroup | None = None
        self._subscription: Any = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Answer from now on."""
        self._tasks = tasks
        await self.sql.start()
        subject = subjects.api_endpoint("history", "query")
        self._subscription = await self.projector.nc.subscribe(subject, queue=QUERY_NAME, cb=self._accept)

    async def close(self) -> None:
        """Take no more queries and end those that run; they are told so."""
        if self._subscription is not None and not self.projector.nc.is_closed:
            await self._subscription.unsubscribe()
        await self.sql.close()

    async def _accept(self, msg: Msg) -> None:
        if self._tasks is not None and msg.reply:
            self._tasks.create_task(self._answer(msg))

    async def _answer(self, msg: Msg) -> None:
        try:
            scope, _, _ = subjects.parse_api(msg.subject)
            request = msgspec.json.decode(msg.data or b"{}", type=QueryRequest)
            await self._reply(msg, scope, request)
        except msgspec.ValidationError as error:
            await self._refuse(msg, UsageError(f"bad history query request: {error}"))
        except HelmrError as error:
            await self._refuse(msg, error)
        except nats.errors.Error as error:
            log.warning("the answer to a query was lost: %s", error)
        except Exception:
            log.exception("a query failed")
            await self._refuse(msg, HelmrError("the history failed to answer", hint="its log on stderr says more"))

    async def _reply(self, msg: Msg, scope: Scope, request: QueryRequest) -> None:
        nc = self.projector.nc
        number = 0

        async def send(part: bytes) -> None:
            nonlocal number
            await nc.publish(msg.reply, part, headers={PART: str(number)})
            number += 1
            # Wait for the server to have it, or a large result would pile up in memory here.
            await nc.flush(timeout=10)

        summary = await self.sql.run(scope, request, send)
        headers = {PART: str(number), END_HEADER: str(number + 1), ROWS_HEADER: str(summary.rows)}
        headers |= {TRUNCATED: summary.truncated} if summary.truncated else {}
        await nc.publish(msg.reply, b"", headers=headers)

    async def _refuse(self, msg: Msg, error: HelmrError) -> None:
        headers = {"Nats-Service-Error": error.code, "Nats-Service-Error-Code": "400"}
        try:
            await self.projector.nc.publish(msg.reply, msgspec.json.encode({"error": error.to_dict()}), headers=headers)
        except nats.errors.Error as lost:
            log.warning("the answer to a query was lost: %s", lost)
