"""The index of a deployment: what its task modules declare, as data.

Made once, at deploy time, by importing them in a child process; everyone else (control, worker, client) reads this instead
of importing anybody's code. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

#: Raised when a reader of an older version could misunderstand.
FORMAT = 1

JsonSchema = dict[str, Any]


class RetryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How a failed attempt is tried again; ``codes`` None means every retryable failure code."""

    max_attempts: int
    min_delay: float
    max_delay: float
    factor: float
    jitter: bool
    codes: tuple[str, ...] | None = None


class SecretEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A secret by name, and where the task expects its value."""

    name: str
    env: str | None = None
    file: str | None = None
    mode: int = 0o400


class TaskEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One task. A schema of None means that anything goes."""

    id: str
    module: str
    name: str  #: of the function
    file: str  #: relative to the project, where it lies inside
    line: int
    doc: str = ""  #: first line of the docstring
    payload_schema: JsonSchema | None = None
    output_schema: JsonSchema | None = None
    sandbox: str = "default"
    max_duration: float = 900.0
    ttl: float | None = None
    retry: RetryEntry | None = None
    queue: str | None = None
    secrets: tuple[SecretEntry, ...] = ()
    park_after: float = 60.0
    cancel_grace: float = 10.0
    on_worker_lost: Literal["redispatch", "fail"] = "redispatch"


class ImageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An image: its base, and steps ``(kind, argument, …)`` in order; see :class:`helmr.Image`."""

    base: str
    steps: tuple[tuple[str, ...], ...] = ()


class SandboxEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One sandbox; ``fingerprint`` is the same exactly if everything else but the name is."""

    name: str
    image: ImageEntry
    cpu: float
    memory: int
    pids: int
    disk: int
    network: str | tuple[str, ...]  #: "internet", "none", or the hosts that may be reached
    mount_path: str
    preload: tuple[str, ...] = ()  #: modules that are imported ahead of the runs
    fingerprint: str = ""

    def fingerprinted(self) -> SandboxEntry:
        """The same, with its fingerprint: the sha-256 of its canonical JSON without name and fingerprint."""
        bare = msgspec.structs.replace(self, name="", fingerprint="")
        digest = hashlib.sha256(msgspec.json.encode(bare, order="sorted")).hexdigest()
        return msgspec.structs.replace(self, fingerprint=digest)


class QueueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One queue; None means no limit."""

    name: str
    concurrency: int | None = None
    concurrency_per_key: int | None = None


class StreamEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a session; a schema of None means that anything goes."""

    name: str
    direction: Literal["input", "output"]
    schema: JsonSchema | None = None


class RetentionEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How many days the history keeps logs and events of the environment; None: as long as the server is told to."""

    keep_logs: int | Literal["forever"] | None = None
    keep_events: int | Literal["forever"] | None = None


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a task project declares, each part sorted by its name."""

    format: int = FORMAT
    tasks: tuple[TaskEntry, ...] = ()
    sandboxes: tuple[SandboxEntry, ...] = ()
    queues: tuple[QueueEntry, ...] = ()
    streams: tuple[StreamEntry, ...] = ()
    schedules: tuple[dict[str, Any], ...] = ()
    retention: RetentionEntry = RetentionEntry()  #: of the project's file, not of its modules

    def task(self, task_id: str) -> TaskEntry | None:
        """The task with this id."""
        return next((each for each in self.tasks if each.id == task_id), None)

    def sandbox(self, name: str) -> SandboxEntry | None:
        """The sandbox of this name."""
        return next((each for each in self.sandboxes if each.name == name), None)

    def queue(self, name: str) -> QueueEntry | None:
        """The queue of this name."""
        return next((each for each in self.queues if each.name == name), None)

    def stream(self, name: str) -> StreamEntry | None:
        """The stream of this name."""
        return next((each for each in self.streams if each.name == name), None)
