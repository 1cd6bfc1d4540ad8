"""The metadata of a run: a small JSON document that the task keeps up to date while people and programs watch it.

Each change sends the whole new document, so that the last message is the state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from helmr import jsonform, runtime
from helmr.errors import TooLarge, UsageError
from helmr.jsonform import ConversionError, to_builtins

#: The whole document, in bytes of JSON.
LIMIT = 256 * 1024


def set(key: str, value: Any) -> None:  # noqa: A001  metadata.set is the name authors know
    """Set one entry.

    Raises:
        TooLarge: the document would exceed 256 KiB; it stays as it was.
        UsageError: the value is not JSON, the key is not text, or there is no run.
    """
    patch({key: value})


def patch(entries: Mapping[str, Any]) -> None:
    """Set several entries at once; others stay. Raises as :func:`set` does."""
    run = runtime.required("metadata.set" if len(entries) == 1 else "metadata.patch")
    changed = {_key(key): _value(key, value) for key, value in entries.items()}
    with run.lock:
        _replace(run, {**run.metadata, **changed}, changed)


def increment(key: str, by: float = 1) -> None:
    """Add to a number; an absent entry counts as 0.

    Raises:
        UsageError: the entry, or ``by``, is not a number.
    """
    run = runtime.required("metadata.increment")
    with run.lock:
        before = run.metadata.get(_key(key), 0)
        for value in (before, by):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"metadata.increment({key!r}): {value!r} is not a number")
        _replace(run, {**run.metadata, key: _value(key, before + by)}, (key,))


def delete(key: str) -> None:
    """Remove one entry; an absent one is fine."""
    run = runtime.required("metadata.delete")
    with run.lock:
        if key in run.metadata:
            _replace(run, {name: value for name, value in run.metadata.items() if name != key}, (key,))


def get(key: str, default: Any = None) -> Any:
    """A copy of one entry."""
    return copy.deepcopy(runtime.required("metadata.get").metadata.get(key, default))


def all() -> dict[str, Any]:  # noqa: A001  metadata.all is the name authors know
    """A copy of the document."""
    return copy.deepcopy(runtime.required("metadata.all").metadata)


def _key(key: object) -> str:
    if isinstance(key, str) and key:
        return key
    raise UsageError(f"a metadata key is text and not empty, not {key!r}")


def _value(key: object, value: Any) -> Any:
    try:
        return to_builtins(value)
    except ConversionError as failure:
        raise UsageError(f"metadata {key!r}: {failure}") from None


def _replace(run: runtime.Runtime, document: dict[str, Any], changed: Iterable[str]) -> None:
    size = len(jsonform.encode(document))
    if size > LIMIT:
        raise TooLarge(
            f"the run's metadata would be {size:,} bytes, more than {LIMIT >> 10} KiB; it stays as it was",
            hint="keep a reference in the metadata and the data in the workspace or an output stream",
        )
    run.change(document, changed)
