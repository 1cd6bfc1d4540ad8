"""What a task may declare about how it is run: the secrets it gets, how it is retried, the queue it waits in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from helmr import registry
from helmr.durations import Duration, seconds
from helmr.errors import ProjectError
from helmr.registry import Location, caller_location
from helmr.secret_targets import FOLDER, env_problem, file_problem

#: Failure codes that a retry can help against; DESIGN section 3 lists the others.
RETRYABLE_CODES = ("max_duration", "out_of_memory", "task_error", "task_exit", "worker_lost")

#: The most runs of a queue at once, so of each limit (:data:`helmr.reducers.queue.MAX_HOLDERS`).
MAX_CONCURRENCY = 1000

#: Names of tasks, sandboxes, queues, streams and secrets: safe as one token of a NATS subject and as a file name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def checked_name(noun: str, name: object, location: Location) -> str:
    """The name, if it is one.

    Raises:
        ProjectError: it is empty, longer than 128 characters, or uses other characters than letters, digits, ``-``, ``_``.
    """
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    raise ProjectError(
        f"{location}: {name!r} is not a {noun} name",
        hint="use 1 to 128 letters, digits, - and _, beginning with a letter or digit",
    )


@dataclass(frozen=True)
class Secret:
    """A secret the task needs, by name; the value is given to its process alone, when it starts.

    Args:
        name: the name it was stored under with ``helmr secret set``.
        env: the environment variable to put it in. Default: one of the same name, unless ``file`` is given.
        file: the path of a file to put it in, below ``/run``, which is memory and never part of a workspace version. With
            the process engine it lies below the folder in ``$HELMR_SECRET_ROOT``.
        mode: permissions of that file, which belongs to the task's user.

    Raises:
        ProjectError: a name or path that cannot be used.
    """

    name: str
    env: str | None = None
    file: str | None = None
    mode: int = 0o400

    def __post_init__(self) -> None:
        place = caller_location()
        checked_name("secret", self.name, place)
        if self.env is None and self.file is None:
            object.__setattr__(self, "env", self.name)
        if self.env is not None and (problem := env_problem(self.env)):
            raise ProjectError(
                f"{place}: secret {self.name!r} cannot be put there: {problem}",
                hint='name another one: Secret("name", env="NAME")',
            )
        if self.file is not None and (problem := file_problem(self.file, self.mode)):
            raise ProjectError(
                f"{place}: secret {self.name!r} cannot be put there: {problem}",
                hint=f"files below {FOLDER} are in memory, and never stored with a workspace",
            )


@dataclass(frozen=True, init=False)
class Retry:
    """How often, and after what delay, a failed attempt is tried again.

    The delay before attempt n+1 is ``min_delay * factor**(n-1)``, at most ``max_delay``; with ``jitter`` a random part of it.

    Args:
        max_attempts: 1 to 10, the first one included.
        codes: the failure codes to retry; default: every retryable one (:data:`RETRYABLE_CODES`).

    Raises:
        ProjectError: a value out of range.
    """

    max_attempts: int
    min_delay: float
    max_delay: float
    factor: float
    jitter: bool
    codes: tuple[str, ...] | None

    def __init__(
        self,
        max_attempts: int = 3,
        *,
        min_delay: Duration = 1,
        max_delay: Duration = 30,
        factor: float = 2.0,
        jitter: bool = True,
        codes: Sequence[str] | None = None,
    ) -> None:
        place = caller_location()
        values = {
            "max_attempts": max_attempts,
            "min_delay": seconds(min_delay, what="min_delay"),
            "max_delay": seconds(max_delay, what="max_delay"),
            "factor": float(factor),
            "jitter": bool(jitter),
            "codes": None if codes is None else tuple(codes),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check(place)

    def _check(self, place: Location) -> None:
        if isinstance(self.max_attempts, bool) or self.max_attempts not in range(1, 11):
            raise ProjectError(f"{place}: Retry(max_attempts={self.max_attempts!r}) is not a whole number from 1 to 10")
        if self.factor < 1 or self.max_delay < self.min_delay:
            raise ProjectError(f"{place}: Retry needs factor >= 1 and max_delay >= min_delay")
        for code in self.codes or ():
            if code not in RETRYABLE_CODES:
                raise ProjectError(
                    f"{place}: Retry(codes=…) names {code!r}, which cannot be retried",
                    hint=f"choose from {', '.join(RETRYABLE_CODES)}",
                )


@dataclass(frozen=True)
class Queue:
    """A named limit on how many runs execute at once.

    ``concurrency`` alone limits the runs of each concurrency key, and those without a key together. With
    ``concurrency_per_key`` that one limits each key, and ``concurrency`` all runs of the queue together.

    Args:
        concurrency: runs at once, 1 to 1,000; None: no limit.
        concurrency_per_key: runs with the same concurrency key at once, 1 to 1,000; None: see above.

    Raises:
        ProjectError: a limit out of range, or another queue of this name with other limits.
    """

    name: str
    concurrency: int | None = None
    concurrency_per_key: int | None = None
    location: Location = field(default=Location("", 0), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        place = caller_location()
        object.__setattr__(self, "location", place)
        checked_name("queue", self.name, place)
        for what, limit in (("concurrency", self.concurrency), ("concurrency_per_key", self.concurrency_per_key)):
            if limit is not None and (isinstance(limit, bool) or limit not in range(1, MAX_CONCURRENCY + 1)):
                raise ProjectError(
                    f"{place}: Queue({self.name!r}, {what}={limit!r}) is not a whole number from 1 to {MAX_CONCURRENCY}"
                )
        registry.declare("queue", registry.queues, self.name, self, place)
