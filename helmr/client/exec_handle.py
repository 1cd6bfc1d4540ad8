"""An exec that this client steers: bytes in and out, each exactly once and in order, over connections that may break.

What the exec writes is heard live. What is missing (the connection was away) is read from where it is kept. What is written to
it is remembered until its worker has it. The worker sends no more than a window ahead of what was read: nothing piles up here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Self

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from helmr import exec_frames, ids, subjects
from helmr.client.wire import PATIENCE, Wire
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable
from helmr.events import ExecEvent
from helmr.exec_frames import (
    CHUNK,
    INPUT_WINDOW,
    OUTPUT_WINDOW,
    Ack,
    Attach,
    Credit,
    Data,
    Displaced,
    End,
    Leave,
    Resize,
    Signal,
)
from helmr.models import Exec, ExecChunk, exec_record

if TYPE_CHECKING:
    from helmr.exec_frames import FromClient

#: Seconds between words to the worker when there is nothing to say, and for its answer.
_KEEP_IN_TOUCH = 2.0
#: Seconds that a chunk which others have overtaken is waited for, before it is read from where it is kept.
_LATE = 1.0
#: Seconds for a start: a container may have to be asked for, but not waited for.
CREATE_TIMEOUT = 15.0
_LAZY = OUTPUT_WINDOW // 8


class OutputPage(msgspec.Struct):
    """A page of what is kept of the output."""

    chunks: list[ExecChunk]
    more: bool


class ExecHandle:
    """Use as ``async with``; iterate over what it writes. Leaving the block ends an exec that has not ended.

    ``record`` is the exec as last known, ``wait`` returns it when it has ended.
    """

    def __init__(self, wire: Wire, exec_id: str, body: dict[str, Any] | None) -> None:
        self.id = exec_id
        self.detached = False  #: whether it goes on when the block is left
        self._wire = wire
        self._body = body  #: what it is started with; None: it is there already
        self._client = ids.new("cli")
        self._record: Exec | None = None
        self._subscriptions: list[Subscription] = []
        self._keeper: asyncio.Task[None] | None = None
        self._failure: HelmrError | None = None
        self._news = asyncio.Event()
        self._arrived: deque[ExecChunk] = deque()
        self._early: list[ExecChunk] = []
        self._stored_after: int | None = None
        self._ends: dict[str, int] = {"stdout": 0, "stderr": 0}
        self._acknowledged = 0
        self._sent = 0
        self._taken = 0
        self._unreceived: deque[Data] = deque()
        self._ending = False
        self._end_received = False
        self._window = asyncio.Event()

    @property
    def record(self) -> Exec:
        """The exec as last known; only inside the block."""
        if self._record is None:
            raise Conflict("the exec has not been started", hint="use the handle as `async with`")
        return self._record

    # Coming and going

    async def __aenter__(self) -> Self:
        scope = self._wire.scope
        try:
            for kept in (True, False):
                await self._listen(subjects.exec_output(scope, self.id, kept=kept), self._on_output)
            await self._listen(subjects.exec_client(scope, self.id, self._client), self._on_frame)
            await self._listen(subjects.live(scope, "exec", self.id), self._on_event)
            if self._body is None:
                self._note(await self._get())
            else:
                body = self._body | {"client": self._client}
                created = await self._wire.call("exec", "create", body, Exec, timeout=CREATE_TIMEOUT)
                self._note(created)
            if self._body is None or self.record.status != "starting":
                await self._join()
            self._keeper = asyncio.create_task(self._keep_in_touch())
        except BaseException:
            await self._hang_up()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if not self.record.ended:
                await self._say(Leave(self._client, self.detached))
        finally:
            await self._hang_up()

    async def _join(self) -> None:
        """It was there before us: its output begins with what is kept, and its input goes on where it is."""
        self._stored_after, self._ends = 0, {}
        if self.record.ended:
            return
        try:
            reply = await self._wire.nc.request(*self._attachment(), timeout=_KEEP_IN_TOUCH)
        except (TimeoutError, nats.errors.Error):
            return  # nobody serves it (any more): whoever keeps in touch will find out
        credit = exec_frames.from_worker(reply.data)
        if isinstance(credit, Credit):
            self._sent = self._taken = credit.received

    def _attachment(self) -> tuple[str, bytes]:
        frame = Attach(self._client, self._ends.get("stdout", 0), self._ends.get("stderr", 0))
        return subjects.exec_input(self._wire.scope, self.id), exec_frames.encode(frame)

    async def _listen(self, subject: str, callback: Any) -> None:
        try:
            self._subscriptions.append(await self._wire.nc.subscribe(subject, cb=callback))
        except nats.errors.Error as error:
            raise Unavailable(f"the connection to NATS was lost: {error}") from error

    async def _hang_up(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        for subscription in self._subscriptions:
            try:
                await subscription.unsubscribe()
            except nats.errors.Error:
                continue  # the connection is closed: nothing is left to undo
        self._subscriptions.clear()

    async def _get(self) -> Exec:
        return await self._wire.call("exec", "get", {"id": self.id}, Exec, patience=PATIENCE)

    # Input

    async def write(self, data: bytes) -> None:
        """Write to its input; waits while the process has too much that it has not read.

        Raises:
            Conflict: it has ended, or its input has.
            Unavailable: its worker cannot be reached.
        """
        if self._ending:
            raise Conflict(f"the input of exec {self.id} has ended")
        for begin in range(0, len(data), CHUNK):
            piece = Data(self._sent, data[begin : begin + CHUNK])
            while self._sent + len(piece.data) > self._taken + INPUT_WINDOW:
                self._require_alive()
                await self._wait_for_news()
            self._require_alive()
            self._sent += len(piece.data)
            self._unreceived.append(piece)
            await self._say(piece)

    async def end_input(self) -> None:
        """Have its input end."""
        self._ending = True
        await self._say(End(self._sent))

    def _require_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.record.ended:
            raise Conflict(f"exec {self.id} has ended")

    async def signal(self, number: int) -> None:
        """Signal its main process and the group of that."""
        await self._say(Signal(number))

    async def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size."""
        await self._say(Resize(rows, columns))

    # Output

    def __aiter__(self) -> AsyncIterator[ExecChunk]:
        """What it writes, until it has ended: chunks of ``stdout`` and ``stderr``, each without a gap.

        Raises:
            Unavailable: its worker cannot be reached any more, or output that is not kept was lost.
            Conflict: another client steers it now.
        """
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[ExecChunk]:
        async for chunk in self._stored():
            yield chunk
        late_since: float | None = None
        while True:
            while self._arrived:
                for chunk in self._put(self._arrived.popleft()):
                    late_since = None
                    yield chunk
                await self._acknowledge()
            if self._failure is not None:
                raise self._failure
            if self._is_complete():
                return
            missing = self._is_missing()
            now = asyncio.get_running_loop().time()
            late_since = (late_since or now) if missing else None
            if late_since is not None and now - late_since >= _LATE:
                async for chunk in self._fetch_missing():
                    yield chunk
                late_since = None
                continue
            await self._wait(_LATE if missing else None)

    async def _wait(self, limit: float | None) -> None:
        if self._arrived:
            return
        self._news.clear()
        try:
            async with asyncio.timeout(limit):
                await self._news.wait()
        except TimeoutError:
            return

    def _put(self, chunk: ExecChunk) -> list[ExecChunk]:
        """What can be said now that this chunk is here."""
        self._early.append(chunk)
        self._early.sort(key=lambda each: each.offset)
        ready = []
        for each in list(self._early):
            end = self._ends.setdefault(each.stream, each.offset)
            if each.offset <= end:
                self._early.remove(each)
                fresh = each.data[end - each.offset :]
                if fresh:
                    self._ends[each.stream] = end + len(fresh)
                    ready.append(msgspec.structs.replace(each, offset=end, data=fresh))
        return ready

    def _totals(self) -> dict[str, int | None]:
        return {"stdout": self.record.stdout, "stderr": self.record.stderr}

    def _is_complete(self) -> bool:
        """Whether it has ended, and all that it wrote was here."""
        if not self.record.ended or self._early:
            return False
        return all(self._ends.get(stream, 0) >= (total or 0) for stream, total in self._totals().items())

    def _is_missing(self) -> bool:
        return bool(self._early) or self.record.ended

    async def _stored(self) -> AsyncIterator[ExecChunk]:
        """What was written before we came, as far as it is kept."""
        while self._stored_after is not None:
            page = await self._page({"after": self._stored_after})
            for stored in page.chunks:
                self._stored_after = stored.seq
                for chunk in self._put(stored):
                    yield chunk
                await self._acknowledge()
            if not page.more:
                self._stored_after = None

    async def _fetch_missing(self) -> AsyncIterator[ExecChunk]:
        """Read what did not arrive from where it is kept.

        Raises:
            Unavailable: it is not.
        """
        before = dict(self._ends)
        for stream in ("stdout", "stderr"):
            more = True
            while more:
                page = await self._page({"stream": stream, "offset": self._ends.get(stream, 0)})
                for stored in page.chunks:
                    for chunk in self._put(stored):
                        yield chunk
                more = page.more and bool(page.chunks)
        if self._ends == before and not self._is_complete() and (self.record.ended or not self.record.kept):
            self._fail(Unavailable("a part of the output was lost, and is not kept", hint="try again"))

    async def _page(self, what: dict[str, Any]) -> OutputPage:
        try:
            return await self._wire.call("exec", "output", {"id": self.id} | what, OutputPage, patience=PATIENCE)
        except NotFound as error:
            raise Unavailable(f"a part of the output was lost: {error.message}", hint="try again") from error

    async def _acknowledge(self) -> None:
        read = sum(self._ends.values())
        if read - self._acknowledged >= _LAZY:
            self._acknowledged = read
            await self._say(Ack(self._client, self._ends.get("stdout", 0), self._ends.get("stderr", 0)))

    async def wait(self) -> Exec:
        """The exec once it has ended; read what it writes meanwhile, or it may wait for you.

        Raises:
            Unavailable: its worker cannot be reached.
        """
        while not self.record.ended:
            if self._failure is not None:
                raise self._failure
            await self._wait_for_news()
        return self.record

    async def _wait_for_news(self) -> None:
        self._window.clear()
        await self._window.wait()

    # What is heard

    def _changed(self) -> None:
        self._news.set()
        self._window.set()

    def _note(self, record: Exec) -> None:
        if self._record is None or record.cursor >= self._record.cursor:
            self._record = record
            self._changed()

    def _fail(self, error: HelmrError) -> None:
        self._failure = self._failure or error
        self._changed()

    async def _on_output(self, msg: Msg) -> None:
        self._arrived.append(exec_frames.parse_output(msg.subject, msg.data))
        self._news.set()

    async def _on_event(self, msg: Msg) -> None:
        event = msgspec.json.decode(msg.data, type=ExecEvent)
        self._note(exec_record(*self._wire.scope, event.state))

    async def _on_frame(self, msg: Msg) -> None:
        frame = exec_frames.from_worker(msg.data)
        if isinstance(frame, Displaced):
            self._fail(Conflict(f"another client has taken over exec {self.id}"))
        else:
            await self._on_credit(frame)
        if msg.reply:  # it wants to know whether we are there
            await msg.respond(b"")

    async def _on_credit(self, credit: Credit) -> None:
        self._taken = max(self._taken, credit.taken)
        self._end_received = self._end_received or credit.ended
        while self._unreceived and self._unreceived[0].offset + len(self._unreceived[0].data) <= credit.received:
            self._unreceived.popleft()
        self._window.set()
        if credit.again:
            await self._send_again()

    async def _send_again(self) -> None:
        for piece in list(self._unreceived):
            await self._say(piece)
        if self._ending and not self._end_received:
            await self._say(End(self._sent))

    async def _say(self, frame: FromClient) -> None:
        """Tell the worker; what gets lost is said again when that is noticed."""
        try:
            await self._wire.nc.publish(subjects.exec_input(self._wire.scope, self.id), exec_frames.encode(frame))
        except (nats.errors.Error, OSError) as error:
            self._fail(Unavailable(f"the connection to NATS was lost: {error}"))

    async def _keep_in_touch(self) -> None:
        """Say now and then that we are here and how far we are; hear whether anybody is there."""
        loop = asyncio.get_running_loop()
        heard, unreceived = loop.time(), -1
        while not self.record.ended and self._failure is None:
            try:
                reply = await self._wire.nc.request(*self._attachment(), timeout=_KEEP_IN_TOUCH)
                credit = exec_frames.from_worker(reply.data)
                if isinstance(credit, Credit):
                    stuck = self._unreceived[0].offset if self._unreceived else self._sent
                    again = credit.received == unreceived and (stuck < self._sent or self._ending)
                    unreceived = credit.received
                    await self._on_credit(msgspec.structs.replace(credit, again=again))
                heard = loop.time()
            except nats.errors.NoRespondersError:
                await self._look()
                heard = loop.time()
            except (TimeoutError, nats.errors.Error, OSError) as error:
                if loop.time() - heard > PATIENCE:
                    self._fail(Unavailable(f"the worker of exec {self.id} cannot be reached: {error}"))
            await asyncio.sleep(_KEEP_IN_TOUCH)

    async def _look(self) -> None:
        """Nobody serves it: it has ended, or its worker has."""
        try:
            self._note(await self._get())
        except HelmrError as error:
            self._fail(error)
