"""Durable steps: what a function returned is recorded once, and returned when the task's code runs again.

``now``, ``uuid4`` and ``random`` are steps of their own: time and chance would take a task another way the next time.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
import typing
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

from helmr import jsonform, runtime
from helmr.convert import from_builtins
from helmr.declarations import Retry
from helmr.errors import StepFailed, TooLarge, UsageError
from helmr.jsonform import ConversionError, to_builtins
from helmr.replay import Slot

if TYPE_CHECKING:
    from uuid import UUID

P = ParamSpec("P")
R = TypeVar("R")

#: What a step returns, in bytes of JSON.
RESULT_LIMIT = 256 * 1024
_MESSAGE_LIMIT = 4096


@overload
def step(fn: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def step(name: str, /, *, retry: Retry | None = ...) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


@overload
def step(name: str, fn: Callable[..., R], /, *args: Any, retry: Retry | None = ..., **kwargs: Any) -> R: ...


def step(name: Any, fn: Any = None, /, *args: Any, retry: Retry | None = None, **kwargs: Any) -> Any:
    """Call ``fn(*args, **kwargs)`` and record what it returns; when the task's code runs again, return that instead.

    Also a decorator, as ``@step`` or ``@step("name", retry=Retry(max_attempts=3))``; each call is then a step, and a function
    defined with ``async def`` stays one.

    Args:
        name: of the step; the same name may be used again, its calls are counted.
        retry: how often and when to call again when it raises; the delays pass while the run is running.

    Returns:
        The value in its JSON form, converted to the type that ``fn`` is annotated to return.

    Raises:
        StepFailed: it raised; what it raised is the ``__cause__``, the first time. A recorded failure is raised again.
        UsageError: the result is not JSON, or this is inside of another step.
        TooLarge: the result exceeds 256 KiB of JSON.
    """
    if callable(name) and fn is None:
        return _decorated(name.__name__, name, retry)
    if fn is None:
        return lambda function: _decorated(name, function, retry)
    if inspect.iscoroutinefunction(fn):
        raise UsageError(f"step {name!r}: {fn.__name__} is an async function", hint="use `await step_async(…)`")
    run = runtime.required("step")
    slot = run.claim("step", name)
    if slot.entry is not None:
        run.redo(slot.entry)
        return _outcome(name, slot.entry, fn)
    with run.step() as scope:
        value, failure = _try(fn, args, kwargs, retry)
    entry = _entry(name, value, failure) | scope.changes()
    run.ask({"op": "step", "call": "step", **slot.key, **entry})
    return _outcome(name, entry, fn, failure)


async def step_async(
    name: str, fn: Callable[..., Awaitable[R]], /, *args: Any, retry: Retry | None = None, **kwargs: Any
) -> R:
    """:func:`step` for a function that is awaited."""
    run = runtime.required("step_async")
    slot = run.claim("step", name)
    if slot.entry is not None:
        run.redo(slot.entry)
        found: R = _outcome(name, slot.entry, fn)
        return found
    with run.step() as scope:
        value, failure = await _try_async(fn, args, kwargs, retry)
    entry = _entry(name, value, failure) | scope.changes()
    await run.ask_async({"op": "step", "call": "step", **slot.key, **entry})
    made: R = _outcome(name, entry, fn, failure)
    return made


def now() -> datetime:
    """The time, in UTC; the same when the task's code runs again."""
    return datetime.fromisoformat(_recorded("now", lambda: datetime.now(timezone.utc).isoformat()))  # noqa: UP017  (3.10)


def uuid4() -> UUID:
    """A random UUID; the same when the task's code runs again."""
    import uuid

    return uuid.UUID(_recorded("uuid4", lambda: str(uuid.uuid4())))


def random() -> float:
    """A random number from 0 up to 1; the same when the task's code runs again."""
    found: float = _recorded("random", _chance)
    return found


def _chance() -> float:
    # Not by the module of the standard library: a process that has it imported has to be seeded anew when it is forked.
    return (int.from_bytes(os.urandom(7), "big") >> 3) * 2.0**-53


def _recorded(call: str, make: Callable[[], Any]) -> Any:
    run = runtime.required(call)
    slot: Slot = run.claim(call, "")
    if slot.entry is not None:
        return slot.entry["result"]
    value = make()
    run.ask({"op": "step", "call": call, **slot.key, "result": value})
    return value


def _decorated(name: str, fn: Callable[..., Any], retry: Retry | None) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await step_async(name, functools.partial(fn, *args, **kwargs), retry=retry)

        return call_async

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return step(name, functools.partial(fn, *args, **kwargs), retry=retry)

    return call


def _try(fn: Callable[..., Any], args: Any, kwargs: Any, retry: Retry | None) -> tuple[Any, Exception | None]:
    """What the function returned, or what it raised at last."""
    for delay in _delays(retry):
        try:
            return fn(*args, **kwargs), None
        except Exception as failure:  # noqa: BLE001  whatever it is, it is what the step came to
            if delay is None:
                return None, failure
            time.sleep(delay)
    raise AssertionError("unreachable")


async def _try_async(
    fn: Callable[..., Awaitable[Any]], args: Any, kwargs: Any, retry: Retry | None
) -> tuple[Any, Exception | None]:
    import asyncio

    for delay in _delays(retry):
        try:
            return await fn(*args, **kwargs), None
        except Exception as failure:  # noqa: BLE001  as above
            if delay is None:
                return None, failure
            await asyncio.sleep(delay)
    raise AssertionError("unreachable")


def _delays(retry: Retry | None) -> Iterator[float | None]:
    """Seconds to wait after each try, None after the last."""
    if retry is not None:
        for attempt in range(1, retry.max_attempts):
            full = min(retry.max_delay, retry.min_delay * retry.factor ** (attempt - 1))
            yield full * _chance() if retry.jitter else full
    yield None


def _entry(name: str, value: Any, failure: Exception | None) -> dict[str, Any]:
    """What is recorded of a step."""
    if failure is not None:
        return {"error": {"type": type(failure).__qualname__, "message": str(failure)[:_MESSAGE_LIMIT]}}
    try:
        result = to_builtins(value)
    except ConversionError as refusal:
        raise UsageError(f"step {name!r} returned what is not JSON: {refusal}") from None
    size = len(jsonform.encode(result))
    if size > RESULT_LIMIT:
        raise TooLarge(
            f"step {name!r} returned {size:,} bytes of JSON, more than {RESULT_LIMIT >> 10} KiB",
            hint="write it to a file in the workspace and return its path",
        )
    return {"result": result}


def _outcome(name: str, entry: dict[str, Any], fn: Any, cause: Exception | None = None) -> Any:
    """What a recorded step returns, or raises."""
    error = entry.get("error")
    if error is not None:
        message = f"step {name!r} failed: {error['type']}: {error['message']}"
        raise StepFailed(message, details={"step": name, **error}) from cause
    kind = _return_type(fn)
    try:
        return entry["result"] if kind is Any else from_builtins(entry["result"], kind)
    except ConversionError as failure:
        raise UsageError(f"step {name!r} did not return what it declares: {failure}") from None


def _return_type(fn: Any) -> Any:
    target = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
    try:
        return typing.get_type_hints(target).get("return", Any)
    except (NameError, TypeError, AttributeError):  # a type that cannot be found converts nothing
        return Any
