"""The seam between authoring calls (``logger``, ``metadata``, ``streams``) and the process they happen in.

A task process installs one :class:`Runtime`; everything a task says passes through it as a JSON message. Outside of a run
there is none, and :func:`recording` puts one in place that collects messages, for authors' tests.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from helmr.context import TaskContext
from helmr.errors import ConcurrentWait, Nondeterminism, UsageError, from_dict
from helmr.replay import Journal, Slot, describe

Message = dict[str, Any]
Send = Callable[[Message], None]
Ask = Callable[[Message], Message]


class Runtime:
    """One run, as seen from inside its process.

    Args:
        send: delivers one message; thread-safe; blocks while the receiver is busy.
        metadata: the run's metadata, as it was when the code that now runs began for the first time.
        entries: what the run recorded when its code ran before, for :class:`helmr.replay.Journal`.
        metadata_calls: how many changes of metadata are recorded.
        ask: delivers one message and waits for the answer.
    """

    def __init__(
        self,
        send: Send,
        metadata: dict[str, Any] | None = None,
        *,
        entries: Iterable[Message] = (),
        metadata_calls: int = 0,
        ask: Ask | None = None,
    ) -> None:
        self.send = send
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.lock = threading.RLock()  #: held while the metadata document changes and the change is sent
        self.main_task: Any = None  #: the asyncio task of an async function
        self.broken: Nondeterminism | None = None
        self._journal = Journal(entries)
        self._metadata_calls = 0
        self._recorded_calls = metadata_calls
        self._ask = ask
        self._waits = False
        self._numbers = itertools.count(1)

    @property
    def replaying(self) -> bool:
        """Whether the code runs again, and has not come to where it was."""
        return self._journal.replaying

    def claim(self, kind: str, name: str) -> Slot:
        """Begin a durable call.

        Raises:
            Nondeterminism: another call was recorded at this place.
            UsageError: inside of a step.
        """
        if _step.get() is not None:
            raise UsageError(
                f"a durable call ({describe(kind, name, 1)}) inside of a step",
                hint="make it outside: of a step only the result is recorded, and not how it came about",
            )
        with self.lock:
            try:
                return self._journal.take(kind, name, main=self._on_main_line())
            except Nondeterminism as failure:
                self.broken = failure
                raise

    def finish(self) -> None:
        """The task's function has returned.

        Raises:
            Nondeterminism: it did less than is recorded, or caught an earlier refusal.
        """
        if self.broken is not None:
            raise self.broken
        self._journal.finish()

    def _on_main_line(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return False
        asyncio = sys.modules.get("asyncio")
        try:
            task = asyncio.current_task() if asyncio is not None else None
        except RuntimeError:  # no event loop runs here
            return True
        return task is self.main_task

    def ask(self, message: Message) -> Message:
        """Send a message and wait for its answer.

        Raises:
            HelmrError: what the answer says.
            Unavailable: nobody is there any more.
        """
        if self._ask is None:
            raise UsageError("this process cannot ask anything of its run")
        answer = self._ask({**message, "id": next(self._numbers)})
        if "failed" in answer:
            raise from_dict(answer["failed"])
        return answer

    async def ask_async(self, message: Message) -> Message:
        """:meth:`ask`, for code that is awaited: in a thread of its own, which a wait may keep busy for long."""
        import asyncio

        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Message] = loop.create_future()

        def settle(found: Message | None, error: Exception | None) -> None:
            if answer.done():
                return
            if found is None:
                answer.set_exception(error or RuntimeError("no answer"))
            else:
                answer.set_result(found)

        def work() -> None:
            found, failed = None, None
            try:
                found = self.ask(message)
            except Exception as error:  # noqa: BLE001  it is raised where the answer is awaited
                failed = error
            with suppress(RuntimeError):  # the loop is closed: nobody awaits it any more
                loop.call_soon_threadsafe(settle, found, failed)

        threading.Thread(target=work, name="helmr-ask", daemon=True).start()
        return await answer

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Be the one wait of the run.

        Raises:
            ConcurrentWait: there is one.
        """
        with self.lock:
            if self._waits:
                raise ConcurrentWait(
                    f"{what}: the run waits for something else already",
                    hint="wait for one thing after the other; the order they come in does not matter",
                )
            self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextmanager
    def step(self) -> Iterator[StepScope]:
        """Be inside of a step."""
        scope = StepScope()
        token = _step.set(scope)
        try:
            yield scope
        finally:
            _step.reset(token)

    def change(self, document: dict[str, Any], changed: Iterable[str]) -> None:
        """Replace the metadata, and say so unless that is recorded; the caller holds :attr:`lock`."""
        keys = sorted(changed)
        self.metadata = document  # first: a cancellation raised by the sending must not make the two differ
        scope = _step.get()
        if scope is not None:
            scope.note({key: document.get(key, _ABSENT) for key in keys})
        else:
            self._metadata_calls += 1
            if self._metadata_calls <= self._recorded_calls:
                return
        self.send({"op": "metadata", "metadata": document, "changed": keys, "n": self._metadata_calls})

    def redo(self, entry: Message) -> None:
        """Change the metadata as a recorded step did."""
        made = entry.get("metadata")
        if made:
            with self.lock:
                kept = {key: value for key, value in self.metadata.items() if key not in made["deleted"]}
                self.metadata = {**kept, **made["set"]}


class _Absent:
    """No value, where None is one."""


_ABSENT = _Absent()


class StepScope:
    """What a step does to the metadata on its way: once it is recorded, its code does not run again to do that."""

    def __init__(self) -> None:
        self._metadata: dict[str, Any] = {}

    def note(self, entries: dict[str, Any]) -> None:
        """Take note of changed entries."""
        self._metadata |= entries

    def changes(self) -> Message:
        """What to record with the step."""
        if not self._metadata:
            return {}
        deleted = [key for key, value in self._metadata.items() if value is _ABSENT]
        left = {key: value for key, value in self._metadata.items() if value is not _ABSENT}
        return {"metadata": {"set": left, "deleted": deleted}}


_step: ContextVar[StepScope | None] = ContextVar("helmr_step", default=None)


def in_step() -> bool:
    """Whether this is inside of a step."""
    return _step.get() is not None


_current: Runtime | None = None


def current() -> Runtime | None:
    """The run this process executes, if it does."""
    return _current


def required(what: str) -> Runtime:
    """The run this process executes.

    Raises:
        UsageError: it executes none; ``what`` names the call that needs one.
    """
    if _current is None:
        raise UsageError(
            f"{what} works only inside a run",
            hint="call it from a task; in a test, wrap the call in `with helmr.runtime.recording():`",
        )
    return _current


def install(runtime: Runtime | None) -> Runtime | None:
    """Make ``runtime`` the run of this process (None: no run) and return the one before."""
    global _current
    before, _current = _current, runtime
    return before


def _forget_in_child() -> None:
    # A forked child shares the parent's socket: what it wrote there would tear the parent's frames apart.
    install(None)


os.register_at_fork(after_in_child=_forget_in_child)


def timestamp() -> str:
    """Now, as RFC 3339 in UTC with milliseconds."""
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"


class Recording:
    """What a task said while :func:`recording` was in force."""

    def __init__(
        self,
        context: TaskContext,
        metadata: dict[str, Any] | None = None,
        inputs: Mapping[str, Iterable[Any]] | None = None,
        completions: Iterable[Any] = (),
    ) -> None:
        self.context = context
        self.messages: list[Message] = []
        self.runtime = Runtime(self.messages.append, metadata, ask=self._answer)
        self._inputs = {stream: deque(records) for stream, records in (inputs or {}).items()}
        self._completions = deque(completions)

    def _answer(self, message: Message) -> Message:
        self.messages.append(message)
        match message["op"], message.get("kind"):
            case "wait", "stream":
                return self._next(self._inputs.get(message["stream"], deque()), message)
            case "wait", "token":
                return self._next(self._completions, message)
            case "peek", _:
                found = self._inputs.get(message["stream"])
                return {"found": bool(found), "result": found[0] if found else None}
            case "token", _:
                return {"token": f"tok_test{message['n']}", "expires_at": "2100-01-01T00:00:00+00:00"}
            case "secret", _:
                return {"secret": f"{message['token']}.test"}
            case _:
                return {"outcome": "completed"}

    @staticmethod
    def _next(waiting: deque[Any], message: Message) -> Message:
        if waiting:
            return {"outcome": "completed", "data": waiting.popleft()}
        if message.get("timeout") is None:
            raise UsageError(
                f"the task waits for ever: {message['name']}", hint="give recording() inputs or completions for it"
            )
        return {"outcome": "timed_out"}

    @property
    def metadata(self) -> dict[str, Any]:
        """The run's metadata as it is now."""
        return self.runtime.metadata

    @property
    def logs(self) -> list[Message]:
        """The messages of ``logger``, in order: ``{op, level, message, fields, at}``."""
        return [message for message in self.messages if message["op"] == "log"]

    def output(self, stream: str) -> list[Any]:
        """The records appended to an output stream, in order."""
        return [each["data"] for each in self.messages if each["op"] == "output" and each["stream"] == stream]


@contextmanager
def recording(
    *,
    workspace: str | os.PathLike[str] = ".",
    metadata: dict[str, Any] | None = None,
    inputs: Mapping[str, Iterable[Any]] | None = None,
    completions: Iterable[Any] = (),
) -> Iterator[Recording]:
    """Collect what tasks say instead of sending it anywhere, so that a test can call a task like any function::

        with helmr.runtime.recording(workspace=tmp_path) as said:
            assert greet(Greeting(name="Ada"), said.context) == {"greeting": "Hello, Ada"}
        assert said.metadata == {"phase": "done"}

    Args:
        workspace: the folder to pretend is the workspace; the current directory is not changed.
        metadata: what the run's metadata is at first.
        inputs: the records that waits find, by input stream; a wait with a timeout that finds none times out at once.
        completions: what tokens are completed with, in the order they are waited for. Timers are over at once.
    """
    facts = {
        "run": {"id": "run_test"},
        "session": {"id": "ses_test"},
        "task": {"id": "test"},
        "workspace": {"id": "ws_test", "path": os.path.abspath(workspace)},  # noqa: PTH100  pathlib costs start-up time
    }
    record = Recording(TaskContext(facts), metadata, inputs, completions)
    before = install(record.runtime)
    try:
        yield record
    finally:
        install(before)
