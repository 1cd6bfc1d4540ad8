"""What a task is told about the run it executes: ``ctx``, and the exception that asks it to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Cancelled(BaseException):
    """Raised in a running ``def`` task when its run is cancelled or has used up its time; ``async def`` tasks see
    :class:`asyncio.CancelledError` instead.

    Clean up in ``finally`` and let it pass: ``cancel_grace`` seconds later the whole process tree is killed. Like
    ``KeyboardInterrupt`` it is no :class:`Exception`, so that ``except Exception`` does not swallow it.
    """


class Facts(Mapping[str, Any]):
    """Read-only facts, as attributes and as a mapping; facts added by later versions are there, too."""

    __slots__ = ("_facts",)

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_facts":  # copying and pickling ask for these before __init__ has run
            raise AttributeError(name)
        try:
            return self._facts[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self._facts)}") from None

    def __getitem__(self, name: str) -> Any:
        return self._facts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._facts!r})"


class RunFacts(Facts):
    """The run: at least its ``id``."""

    __slots__ = ()
    id: str


class SessionFacts(Facts):
    """The session the run belongs to: at least its ``id``."""

    __slots__ = ()
    id: str


class TaskFacts(Facts):
    """The task: at least its ``id``."""

    __slots__ = ()
    id: str


class WorkspaceFacts(Facts):
    """The workspace: its ``id``, and the ``path`` of its files, which is also the folder the task starts in."""

    __slots__ = ()
    id: str
    path: str


class TaskContext:
    """What a task is told when it takes a parameter named ``ctx``.

    Attributes:
        attempt: the task-level try, from 1; only the retry policy raises it.
        turn: 0 in the first run of a session, one more in each run that continues it.
    """

    __slots__ = ("_cancelled", "_replaying", "attempt", "run", "session", "task", "turn", "workspace")

    def __init__(
        self,
        facts: Mapping[str, Any],
        cancelled: Callable[[], bool] = lambda: False,
        replaying: Callable[[], bool] = lambda: False,
    ) -> None:
        self.run = RunFacts(facts.get("run") or {})
        self.session = SessionFacts(facts.get("session") or {})
        self.task = TaskFacts(facts.get("task") or {})
        self.workspace = WorkspaceFacts(facts.get("workspace") or {})
        self.attempt: int = facts.get("attempt", 1)
        self.turn: int = facts.get("turn", 0)
        self._cancelled = cancelled
        self._replaying = replaying

    @property
    def cancelled(self) -> bool:
        """Whether the run has been asked to stop; for loops and threads that :class:`Cancelled` does not reach."""
        return self._cancelled()

    @property
    def replaying(self) -> bool:
        """Whether the task's code runs again, and has not come to where it was: its durable calls return what is recorded."""
        return self._replaying()

    def __repr__(self) -> str:
        return f"<TaskContext of {self.run.get('id', 'no run')}, attempt {self.attempt}>"
