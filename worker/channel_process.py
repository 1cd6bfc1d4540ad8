"""One process tree as its worker sees it: frames to take, in order, and what can be asked of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from helmr.errors import Conflict, TooLarge, Unavailable
from helmr.guest import journal, protocol
from worker.engine import Exited, Frame, Terminal

if TYPE_CHECKING:
    from worker.channel import Channel

#: Bytes, and frames, that may go unacknowledged: a part of the window that the supervisor keeps, so that it never has to wait.
_LAZY_BYTES = journal.WINDOW_BYTES // 4
_LAZY_FRAMES = journal.WINDOW_FRAMES // 4
#: Bytes of one process that an honest supervisor never exceeds: its window, and what it reads past it at most (at the exit of
#: a process that enlarged its pipes).
_BUFFER_LIMIT = journal.WINDOW_BYTES + 8 * 1024 * 1024


class ChannelProcess:
    """A process tree behind a channel (:class:`worker.engine.Process`).

    One consumer at a time takes its frames. After the end of :meth:`frames` the supervisor forgets the process, and its id
    may be used again; so take frames to the end, also when only the exit matters.
    """

    def __init__(self, channel: Channel, ident: str, number: int, taken: int = 0) -> None:
        self.id = ident
        self.number = number
        #: The sequence of the last frame that the consumer is done with: what to resume from.
        self.taken = taken
        self.ended = False  #: Exited has arrived, though perhaps not been taken yet
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel = channel
        self._received = taken
        self._frames: deque[tuple[int, Frame, int]] = deque()
        self._buffered = 0
        self._acknowledged = taken
        self._owed = 0  # bytes taken since the last acknowledgement
        self._handed_out = taken
        self._handed_size = 0
        #: Frames handed out and not settled, each with its size; None: taking the next one settles the one before.
        self._unsettled: deque[tuple[int, int]] | None = None
        self._unsettled_size = 0
        self._finished = False
        self._waiter: asyncio.Future[None] | None = None
        self._sends: deque[asyncio.Future[None]] = deque()
        self._abandoned = False
        self._told_of_taken: Callable[[int], None] = lambda _: None

    @property
    def over(self) -> bool:
        """Whether nothing is to be expected of it any more, here or there."""
        return self.ended and self.taken == self._received

    @property
    def owing(self) -> bool:
        """Whether what was taken should be acknowledged now."""
        return self.over or self._owed >= _LAZY_BYTES or self.taken - self._acknowledged >= _LAZY_FRAMES

    def acknowledged(self) -> None:
        """Take note that the supervisor has been told what was taken."""
        self._acknowledged = self.taken
        self._owed = 0

    def frames(self) -> AsyncIterator[Frame]:
        """Everything the tree says; a second call goes on where the first one stopped."""
        return _Frames(self)

    @property
    def at(self) -> int:
        """The sequence of the frame that was handed out last."""
        return self._handed_out

    @property
    def backlog(self) -> float:
        """How much of the supervisor's window is taken by frames that were handed out and not settled: 0 to 1, or more."""
        frames = len(self._unsettled or ())
        return max(self._unsettled_size / journal.WINDOW_BYTES, frames / journal.WINDOW_FRAMES)

    def settle_by_hand(self) -> None:
        """From now on a frame is done with when :meth:`settle` says so, and comes again for a successor until then."""
        if self._unsettled is None:
            self._unsettled = deque()
            if self._handed_out > self.taken:
                self._hold(self._handed_out, self._handed_size)

    def settle_as_taken(self) -> None:
        """From now on taking a frame is being done with the one before, and with all that have been taken."""
        self.settle(self._handed_out)
        self._unsettled = None

    def settle(self, sequence: int) -> None:
        """Be done with the frames up to ``sequence``."""
        held = self._unsettled
        if not held or held[0][0] > sequence:
            return
        size = 0
        last = self.taken
        while held and held[0][0] <= sequence:
            last, more = held.popleft()
            size += more
        self._unsettled_size -= size
        self._acknowledge(last, size)

    def _hold(self, sequence: int, size: int) -> None:
        if self._unsettled is not None:
            self._unsettled.append((sequence, size))
            self._unsettled_size += size

    async def next_frame(self) -> Frame | None:
        """Be done with the frame before (unless that is settled by hand) and wait for the next; None after :class:`Exited`."""
        if self._unsettled is None:
            self._acknowledge(self._handed_out, self._handed_size)
        if self._finished:
            return None
        while not self._frames:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._handed_out, frame, self._handed_size = self._frames.popleft()
        self._buffered -= self._handed_size
        self._hold(self._handed_out, self._handed_size)
        self._finished = isinstance(frame, Exited)
        return frame

    async def send(self, body: dict[str, Any]) -> None:
        """Deliver one JSON object to the task; returns when the task's socket has taken it, however slow the task reads.

        Raises:
            TooLarge: it exceeds 1 MiB.
            Conflict: the process has ended, or no longer listens.
            Unavailable: the machine is gone.
        """
        text = msgspec.json.encode(body)
        if len(text) > protocol.MAX_MESSAGE:
            raise TooLarge(f"a message of {len(text)} bytes exceeds the limit of {protocol.MAX_MESSAGE}")
        if self.ended:
            raise self._channel.gone() if self._channel.lost else Conflict(f"process {self.id} has ended")
        self._channel.write(protocol.frame(protocol.SEND, self.number, 0, text))
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sends.append(answer)
        await answer

    async def cancel(self, grace: float) -> None:
        """Ask for the end; asking again can only shorten the grace. Of a process that has ended nothing is asked."""
        if not self.ended:
            self._channel.write(protocol.json_frame(protocol.CANCEL, {"grace": max(0.0, grace)}, self.number))

    async def limit(self, deadline: float, grace: float) -> None:
        """Replace the deadline. Of a process that has ended nothing is asked."""
        if not self.ended:
            body = {"deadline": deadline, "grace": max(0.0, grace)}
            self._channel.write(protocol.json_frame(protocol.LIMIT, body, self.number))

    def feed(self, data: bytes) -> None:
        """Pass bytes on to the input. Those for a process that has ended are gone."""
        if not self.ended:
            self._channel.write(protocol.frame(protocol.INPUT, self.number, 0, data))

    def end_input(self) -> None:
        """Have the input end after what was fed."""
        if not self.ended:
            self._channel.write(protocol.frame(protocol.INPUT_END, self.number))

    def on_taken(self, listener: Callable[[int], None]) -> None:
        """Have ``listener`` told how much of its input the process has taken."""
        self._told_of_taken = listener

    def resize(self, size: Terminal) -> None:
        """Give the terminal another size."""
        if not self.ended:
            body = {"rows": size.rows, "columns": size.columns}
            self._channel.write(protocol.json_frame(protocol.RESIZE, body, self.number))

    def signal(self, number: int) -> None:
        """Signal the main process and its group."""
        if not self.ended:
            self._channel.write(protocol.json_frame(protocol.SIGNAL, {"signal": number}, self.number))

    def abandon(self) -> None:
        """End the tree and take its frames unseen: whoever started it is not there any more."""
        self._abandoned = True
        if not self.ended:
            self._channel.write(protocol.json_frame(protocol.CANCEL, {"grace": 0.0}, self.number))
        if self._frames:
            self._acknowledge(self._frames[-1][0], self._buffered)
            self._frames.clear()
            self._buffered = 0

    # Called by the channel

    def deliver(self, sequence: int, frame: Frame, size: int) -> None:
        """Take in a frame, once."""
        if sequence <= self._received:
            return
        self._buffered += size
        if self._buffered > _BUFFER_LIMIT:
            raise protocol.ProtocolError(f"it sends more of process {self.id} than its window allows")
        self._received = sequence
        self._put(sequence, frame, size)

    def lose(self, reason: str) -> None:
        """The machine is gone: say so, unless the end was known already."""
        if not self.ended:
            self._put(self._received, Exited(cause="lost", detail=reason))

    def sent(self, error: str | None) -> None:
        """The supervisor's answer to the oldest message that has none yet."""
        answer = self._sends.popleft()
        if answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(Conflict(f"process {self.id} did not take the message: {error}"))

    def taken_input(self, size: int) -> None:
        """The supervisor tells how much of its input the process has taken."""
        self._told_of_taken(size)

    def _put(self, sequence: int, frame: Frame, size: int = 0) -> None:
        if isinstance(frame, Exited):
            self.ended = True
        if self._abandoned:
            self._buffered -= size
            self._acknowledge(sequence, size)
            return
        self._frames.append((sequence, frame, size))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _acknowledge(self, sequence: int, size: int) -> None:
        if sequence > self.taken:
            self.taken = sequence
            self._owed += size
            self._channel.acknowledge(self)

    def close(self, reason: str) -> None:
        """Fail whatever waits for an answer."""
        for answer in (self.started, *self._sends):
            if not answer.done():
                answer.set_exception(Unavailable(reason))
                answer.exception()  # marked as seen: it may be that nobody waits any more
        self._sends.clear()


class _Frames(AsyncIterator[Frame]):
    """The frames of one process, for ``async for``."""

    def __init__(self, process: ChannelProcess) -> None:
        self._process = process

    async def __anext__(self) -> Frame:
        frame = await self._process.next_frame()
        if frame is None:
            raise StopAsyncIteration
        return frame
