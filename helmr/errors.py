"""Every error Helmr raises, in one tree, each with a stable ``code`` that scripts can match on.

::

    HelmrError                  failure
    ├── UsageError              usage: the request itself is wrong
    │   ├── ConfigError         config: helmr.toml, a flag or a HELMR_* variable
    │   ├── ProjectError        project: a task module cannot be imported or declares something twice
    │   ├── PayloadInvalid      payload_invalid: the payload does not fit the task's schema
    │   ├── TooLarge            too_large: a documented size limit is exceeded
    │   └── ConcurrentWait      concurrent_wait: the run waits for something else already
    ├── NotFound                not_found
    ├── Conflict                conflict: somebody else was first, or the state forbids it
    ├── Unavailable             unavailable: no connection, no engine, or a part does not answer
    │   └── EngineUnavailable   engine_unavailable: the container engine cannot be used
    ├── NotAllowed              not_allowed
    ├── TimedOut                timed_out
    │   └── WaitTimeout         wait_timeout: what the task waited for did not come in time
    ├── WaitCancelled           wait_cancelled: what the task waits for will never come
    ├── StepFailed              step_failed: a durable step raised
    ├── Nondeterminism          nondeterminism: a task, executed again, took another way than the time before
    ├── RunFailed               run_failed: ``RunHandle.result()`` of a run that did not succeed
    └── ImageError              image_error: an image cannot be built or pulled

Transport errors (NATS, Docker, DuckDB) are translated where they arise and never leak through this tree.
Standard library only: this module also runs inside containers.
"""

from __future__ import annotations

from typing import Any, ClassVar


class HelmrError(Exception):
    """Something failed; ``hint`` says what to do next and ``details`` holds machine-readable facts."""

    code: ClassVar[str] = "failure"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}

    def to_dict(self) -> dict[str, Any]:
        """The error as it travels over the wire: ``{code, message, hint, details}``."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


class UsageError(HelmrError):
    """The request itself is wrong; repeating it will not help."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """``helmr.toml``, a flag or a ``HELMR_*`` variable is wrong."""

    code = "config"


class ProjectError(UsageError):
    """A task module cannot be imported, or declares something that contradicts itself."""

    code = "project"
    exit_code = 1


class PayloadInvalid(UsageError):
    """The payload does not fit the task's schema; no run was created."""

    code = "payload_invalid"


class TooLarge(UsageError):
    """A documented size limit is exceeded."""

    code = "too_large"


class NotFound(HelmrError):
    """Nothing with this id or name exists in this project and environment."""

    code = "not_found"
    exit_code = 5


class Conflict(HelmrError):
    """Somebody else was first, or the present state forbids the request."""

    code = "conflict"
    exit_code = 6


class Unavailable(HelmrError):
    """No connection, or a part of Helmr does not answer."""

    code = "unavailable"
    exit_code = 4


class EngineUnavailable(Unavailable):
    """The container engine cannot be reached or used."""

    code = "engine_unavailable"


class NotAllowed(HelmrError):
    """The credentials do not permit this."""

    code = "not_allowed"
    exit_code = 4


class TimedOut(HelmrError):
    """The answer did not come within the time given; the request may still have taken effect."""

    code = "timed_out"
    exit_code = 7


class ConcurrentWait(UsageError):
    """A run waits for one thing at a time, and it waits for something else already; that wait goes on."""

    code = "concurrent_wait"


class WaitTimeout(TimedOut):
    """What the task waited for did not come in time; the task may go on."""

    code = "wait_timeout"


class WaitCancelled(HelmrError):
    """What the task waits for will never come: the token was cancelled."""

    code = "wait_cancelled"


class StepFailed(HelmrError):
    """A durable step raised; what it raised is the ``__cause__``, when it has just happened."""

    code = "step_failed"


class Nondeterminism(HelmrError):
    """A task, executed again, took another way than the time before; the run fails, whatever the task makes of this."""

    code = "nondeterminism"


class RunFailed(HelmrError):
    """The run ended other than ``succeeded``; ``details`` holds its status and failure."""

    code = "run_failed"
    exit_code = 3


class ImageError(HelmrError):
    """An image cannot be pulled or built; ``details["log"]`` holds the end of the builder's output."""

    code = "image_error"


def _tree(root: type[HelmrError]) -> dict[str, type[HelmrError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        # A subclass without a code of its own (some module's private refinement) does not stand for its parent's.
        found = _tree(child) | found
    return found


def from_dict(data: dict[str, Any]) -> HelmrError:
    """The error that :meth:`HelmrError.to_dict` described; an unknown code becomes a plain :class:`HelmrError`."""
    kind = _tree(HelmrError).get(str(data.get("code")), HelmrError)
    return kind(str(data.get("message", "unknown error")), hint=data.get("hint"), details=data.get("details") or {})


def cause(error: BaseException) -> BaseException:
    """The one error to tell people of a group of them: Helmr's own first, because the others are mostly its consequences."""
    leaves = list(_leaves(error))
    return next((leaf for leaf in leaves if isinstance(leaf, HelmrError)), leaves[0])


def _leaves(error: BaseException) -> list[BaseException]:
    # By its attribute: Python 3.10, which containers may have, does not know groups.
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return [leaf for each in inner for leaf in _leaves(each)] or [error]
