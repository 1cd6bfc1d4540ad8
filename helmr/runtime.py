"""The seam between authoring calls (``logger``, ``metadata``, ``streams``) and the process they happen in.

A task process installs one :class:`Runtime`; everything a task says passes through it as a JSON message. Outside of a run
there is none, and :func:`recording` puts one in place that collects messages, for authors' tests.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from helmr.context import TaskContext
from helmr.errors import UsageError

Message = dict[str, Any]
Send = Callable[[Message], None]


class Runtime:
    """One run, as seen from inside its process.

    Args:
        send: delivers one message; thread-safe; blocks while the receiver is busy.
        metadata: the run's metadata as it is now.
    """

    def __init__(self, send: Send, metadata: dict[str, Any] | None = None) -> None:
        self.send = send
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.lock = threading.RLock()  #: held while the metadata document changes and the change is sent


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

    def __init__(self, context: TaskContext, metadata: dict[str, Any] | None = None) -> None:
        self.context = context
        self.messages: list[Message] = []
        self.runtime = Runtime(self.messages.append, metadata)

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
    *, workspace: str | os.PathLike[str] = ".", metadata: dict[str, Any] | None = None
) -> Iterator[Recording]:
    """Collect what tasks say instead of sending it anywhere, so that a test can call a task like any function::

        with helmr.runtime.recording(workspace=tmp_path) as said:
            assert greet(Greeting(name="Ada"), said.context) == {"greeting": "Hello, Ada"}
        assert said.metadata == {"phase": "done"}

    Args:
        workspace: the folder to pretend is the workspace; the current directory is not changed.
        metadata: what the run's metadata is at first.
    """
    facts = {
        "run": {"id": "run_test"},
        "session": {"id": "ses_test"},
        "task": {"id": "test"},
        "workspace": {"id": "ws_test", "path": os.path.abspath(workspace)},  # noqa: PTH100  pathlib costs start-up time
    }
    record = Recording(TaskContext(facts), metadata)
    before = install(record.runtime)
    try:
        yield record
    finally:
        install(before)
