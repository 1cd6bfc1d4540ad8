"""The ``@task`` decorator, and what it makes of a function: a task with an id, limits, and a known payload type."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Generic, Literal, ParamSpec, TypeVar, overload

from helmr import registry
from helmr.declarations import Queue, Retry, Secret, checked_name
from helmr.durations import Duration, seconds
from helmr.errors import ProjectError, UsageError
from helmr.registry import Location, caller
from helmr.sandbox import Sandbox

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_MAX_DURATION = 900.0
MIN_MAX_DURATION = 5.0
MAX_MAX_DURATION = 86_400.0
DEFAULT_PARK_AFTER = 60.0
DEFAULT_CANCEL_GRACE = 10.0

OnWorkerLost = Literal["redispatch", "fail"]

_PARAMETERS = ("payload", "ctx")


class Task(Generic[P, R]):
    """A function that can be started as a run. Calling it calls the function, here and now.

    Attributes:
        id: unique in its project.
        fn: the function itself.
        location: where it is defined.
        parameters: which of ``payload`` and ``ctx`` it takes, in its order.
        max_duration: seconds of running, waits not counted.
        ttl: seconds it may stay queued before it expires, or None.
        park_after: seconds its process is kept in memory while the run waits.
        cancel_grace: seconds between being asked to stop and being killed.
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        fn: Callable[P, R],
        id: str,  # noqa: A002  the attribute is called id
        location: Location,
        *,
        scope: dict[str, Any] | None = None,
        sandbox: Sandbox | None = None,
        max_duration: Duration = DEFAULT_MAX_DURATION,
        secrets: Iterable[Secret] = (),
        retry: Retry | None = None,
        queue: Queue | None = None,
        park_after: Duration = DEFAULT_PARK_AFTER,
        ttl: Duration | None = None,
        cancel_grace: Duration = DEFAULT_CANCEL_GRACE,
        on_worker_lost: OnWorkerLost = "redispatch",
    ) -> None:
        self.fn = fn
        self.location = location
        self.id = checked_name("task", id, location)
        self.sandbox = self._is("sandbox", sandbox, Sandbox)
        self.retry = self._is("retry", retry, Retry)
        self.queue = self._is("queue", queue, Queue)
        self.secrets = self._checked_secrets(secrets)
        self.max_duration = self._checked_max_duration(max_duration)
        self.park_after = self._seconds("park_after", park_after)
        self.cancel_grace = self._seconds("cancel_grace", cancel_grace)
        self.ttl = None if ttl is None else self._seconds("ttl", ttl)
        if on_worker_lost not in typing.get_args(OnWorkerLost):
            raise self._refused(f"on_worker_lost={on_worker_lost!r} is neither 'redispatch' nor 'fail'")
        self.on_worker_lost: OnWorkerLost = on_worker_lost
        self._signature = inspect.signature(fn)
        self.parameters = self._checked_parameters()
        self._scope = scope
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.id} at {self.location}>"

    @functools.cached_property
    def payload_type(self) -> Any:
        """The annotation of ``payload``, resolved; :data:`typing.Any` without one, None when there is no such parameter.

        Raises:
            ProjectError: the annotation names something that cannot be found.
        """
        return self._annotation("payload") if "payload" in self.parameters else None

    @functools.cached_property
    def return_type(self) -> Any:
        """The annotation of what the function returns, resolved; :data:`typing.Any` without one. Raises as above."""
        return self._annotation("return")

    @property
    def payload_optional(self) -> bool:
        """Whether ``payload`` has a default, so that a start without payload is fine."""
        return self.payload_default is not inspect.Parameter.empty

    @property
    def payload_default(self) -> Any:
        """The default of ``payload``, or :attr:`inspect.Parameter.empty`."""
        parameter = self._signature.parameters.get("payload")
        return inspect.Parameter.empty if parameter is None else parameter.default

    def arguments(self, payload: Any, ctx: Any) -> inspect.BoundArguments:
        """What to call the function with: those of the two that it takes."""
        values = {"payload": payload, "ctx": ctx}
        chosen = OrderedDict((name, values[name]) for name in self.parameters)
        return inspect.BoundArguments(self._signature, chosen)

    def _annotation(self, name: str) -> Any:
        found = _annotations(self.fn).get(name, Any)
        holder = SimpleNamespace(__annotations__={name: found})
        try:
            return typing.get_type_hints(holder, _globals(self.fn), self._scope, include_extras=True)[name]
        except (NameError, TypeError, SyntaxError) as failure:
            raise self._refused(
                f"the annotation of {name!r} cannot be resolved: {failure}",
                "import what it names at module level, not under TYPE_CHECKING",
            ) from failure

    def _refused(self, what: str, hint: str | None = None) -> ProjectError:
        return ProjectError(f"{self.location}: task {getattr(self, 'id', '?')!r}: {what}", hint=hint)

    def _is(self, what: str, value: Any, kind: type[Any]) -> Any:
        if value is not None and not isinstance(value, kind):
            raise self._refused(f"{what}={value!r} is not a {kind.__name__}")
        return value

    def _seconds(self, what: str, value: Duration) -> float:
        try:
            return seconds(value, what=what)
        except UsageError as failure:
            raise self._refused(failure.message, failure.hint) from None

    def _checked_max_duration(self, value: Duration) -> float:
        result = self._seconds("max_duration", value)
        if not MIN_MAX_DURATION <= result <= MAX_MAX_DURATION:
            raise self._refused(f"max_duration={value!r} is not between 5s and 24h")
        return result

    def _checked_secrets(self, secrets: Iterable[Secret]) -> tuple[Secret, ...]:
        declared = tuple(secrets)
        targets: set[str] = set()
        for secret in declared:
            if not isinstance(secret, Secret):
                raise self._refused(f"secrets has {secret!r} in it", 'write secrets=[Secret("NAME")]')
            for target in filter(None, (secret.env, secret.file)):
                if target in targets:
                    raise self._refused(f"two secrets go to {target}")
                targets.add(target)
        return declared

    def _checked_parameters(self) -> tuple[str, ...]:
        fn = self.fn
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise self._refused("it yields", "return the result; append what comes before it to a streams.output(…)")
        names = []
        for name, parameter in self._signature.parameters.items():
            if name in _PARAMETERS and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                names.append(name)
            elif parameter.default is parameter.empty or name not in _PARAMETERS:
                raise self._refused(
                    f"it takes {name!r}",
                    "a task takes `payload`, `ctx`, both or neither, by these names; put other values into the payload",
                )
        return tuple(names)


def _annotations(fn: Callable[..., Any]) -> dict[str, Any]:
    target = inspect.unwrap(fn)
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(target, format=annotationlib.Format.FORWARDREF)
    return dict(getattr(target, "__annotations__", {}))


def _globals(fn: Callable[..., Any]) -> dict[str, Any]:
    return getattr(inspect.unwrap(fn), "__globals__", {})


@overload
def task(fn: Callable[P, R], /) -> Task[P, R]: ...


@overload
def task(
    id: str | None = None,
    /,
    *,
    sandbox: Sandbox | None = None,
    max_duration: Duration = DEFAULT_MAX_DURATION,
    secrets: Iterable[Secret] = (),
    retry: Retry | None = None,
    queue: Queue | None = None,
    park_after: Duration = DEFAULT_PARK_AFTER,
    ttl: Duration | None = None,
    cancel_grace: Duration = DEFAULT_CANCEL_GRACE,
    on_worker_lost: OnWorkerLost = "redispatch",
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def task(id: Any = None, /, **options: Any) -> Any:  # noqa: A002
    """Make a function a task.

    ``@task("review-pr", max_duration="15m")``, or plain ``@task``: then the id is the function's name with ``-`` for ``_``.
    The function takes ``payload``, ``ctx``, both or neither, by these names; its annotations say what a payload and an
    output must be, and are checked.

    Args:
        id: letters, digits, ``-`` and ``_``; at most 128.
        sandbox: where it runs; None: the default sandbox.
        max_duration: 5 s to 24 h of running; waits do not count.
        secrets: what to put into its environment or files; starting it without one that is set is refused.
        retry: None: a failed attempt fails the run.
        queue: a shared limit on runs at once; None: no limit.
        park_after: how long its process is kept while the run waits.
        ttl: how long it may stay queued before its first start; None: for ever.
        cancel_grace: how long it may clean up when asked to stop.
        on_worker_lost: ``"redispatch"`` executes the attempt again on another worker, ``"fail"`` does not.

    Raises:
        ProjectError: something of this cannot be; the message names file and line.
    """
    frame = caller()
    scope = None if frame.f_locals is frame.f_globals else frame.f_locals

    def declare(fn: Callable[P, R]) -> Task[P, R]:
        location = _location_of(fn, Location(frame_file, frame_line))
        name = id if isinstance(id, str) else getattr(fn, "__name__", "").replace("_", "-")
        made = Task(fn, name, location, scope=scope, **options)
        registry.declare("task", registry.tasks, made.id, made, location, unique=True)
        return made

    frame_file, frame_line = frame.f_code.co_filename, frame.f_lineno
    return declare(id) if callable(id) else declare


def _location_of(fn: Callable[..., Any], otherwise: Location) -> Location:
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return otherwise if code is None else Location(code.co_filename, code.co_firstlineno)
