"""One stream of what a task prints, on its way to the log: without secrets, and from the byte on that is not there yet."""

from __future__ import annotations

from bus.bookmark import Torn
from helmr.chunks import LogEnd
from worker.engine import Output
from worker.log_pump import LogPump
from worker.masking import MaskedStream


class TaskOutput:
    """Carries stdout or stderr of one process.

    ``end`` is where the log of the process has got to; None: begin with whatever comes. What is masked from there on is what it
    would have been in one piece, because what a masker holds back is not in the log.
    """

    def __init__(self, pump: LogPump, name: str, masked: MaskedStream, end: LogEnd | None) -> None:
        self._pump = pump
        self._name = name
        self._masked = masked
        self._position = end.position if end is not None else None
        self._skip = end.skip if end is not None else 0
        #: The frame that holds the first of the bytes held back, if any are.
        self.holds: int | None = None

    async def take(self, output: Output, frame: int) -> None:
        """Pass on what is new in some bytes of the stream.

        Raises:
            Torn: there are bytes before them that never came.
        """
        if self._position is None:
            self._position = output.offset
            await self._write(b"", frame)
        if output.offset > self._position:
            raise Torn(f"{output.offset - self._position} bytes of {self._name} were lost with its worker")
        data = output.data[self._position - output.offset :]
        if data:
            self._position += len(data)
            await self._write(self._masked.feed(data), frame)
            self._note_held(len(data), frame)

    async def finish(self, frame: int) -> None:
        """Pass on what is held back: nothing follows, for now."""
        if self._position is not None:
            await self._write(self._masked.end(), frame)
            self.holds = None

    async def _write(self, data: bytes, frame: int) -> None:
        skipped, self._skip = min(self._skip, len(data)), max(self._skip - len(data), 0)
        position = (self._position or 0) - self._masked.held
        await self._pump.write(self._name, data[skipped:], position=position, lag=self._skip, frame=self.holds or frame)

    def _note_held(self, size: int, frame: int) -> None:
        if not self._masked.held:
            self.holds = None
        elif self.holds is None or self._masked.held <= size:
            self.holds = frame
