"""The life of an exec: created for one worker, started there once, and ended once, by itself or by the loss of its worker."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import msgspec

from helmr.errors import Conflict
from helmr.events import Draft, ExecState, ExecStatus

_ENDS: dict[str, ExecStatus] = {"exited": "exited", "failed": "failed", "lost": "lost"}
_FACTS = ("exit_code", "signal", "cause", "oom", "reason", "stdout", "stderr")


def apply(state: ExecState | None, kind: str, data: dict[str, Any], at: datetime, *, exec_id: str = "") -> ExecState:
    """The state after one more event.

    Raises:
        Conflict: the event may not follow; once the exec has ended that is every event.
    """
    if state is None:
        if kind != "created":
            raise Conflict(f"the first event of an exec is created, not {kind}")
        fixed = {"id": exec_id, "status": "starting", "cursor": 1, "created_at": at}
        return msgspec.convert({**data, **fixed}, ExecState, strict=False)
    base = msgspec.structs.replace(state, cursor=state.cursor + 1)
    if kind == "started" and state.status == "starting":
        return msgspec.structs.replace(base, status="running", started_at=at)
    if kind not in _ENDS or not state.live:
        raise Conflict(f"exec {state.id} is {state.status}: {kind} cannot follow", details={"status": state.status})
    facts = {name: data[name] for name in _FACTS if data.get(name) is not None}
    return msgspec.structs.replace(base, status=_ENDS[kind], finished_at=at, **facts)


def create(
    *,
    workspace_id: str,
    worker: str,
    argv: tuple[str, ...],
    cwd: str | None,
    terminal: bool,
    kept: bool,
    asked: dict[str, Any],
) -> Draft:
    """A new exec, for one worker; ``asked`` is all that was asked for, by which a repetition is known."""
    data: dict[str, Any] = {"workspace_id": workspace_id, "worker": worker, "argv": list(argv), "cwd": cwd}
    data |= {"terminal": terminal, "kept": kept, "fingerprint": fingerprint(asked)}
    return Draft(kind="created", data=data, message=f"for {worker}")


def fingerprint(asked: dict[str, Any]) -> str:
    """A digest of what was asked for. The environment is part of it, and nowhere else: it may hold secrets."""
    return hashlib.sha256(msgspec.json.encode(asked, order="sorted")).hexdigest()[:32]


def start(state: ExecState, *, worker: str) -> Draft:
    """The worker is about to start it.

    Raises:
        Conflict: it was started before, has ended, or is another worker's: it must not be executed twice.
    """
    if state.status != "starting" or state.worker != worker:
        raise Conflict(f"exec {state.id} is {state.status} on {state.worker}", details={"status": state.status})
    return Draft(kind="started", message=f"started by {worker}", source="worker")


def exit_(state: ExecState, facts: dict[str, Any]) -> Draft | None:
    """It has ended, and nothing of it is left. None: it was given up before."""
    if not state.live:
        return None
    code, number = facts.get("exit_code"), facts.get("signal")
    message = f"exit code {code}" if number is None else f"ended by signal {number}"
    return Draft(kind="exited", data=facts, message=message, source="worker")


def fail(state: ExecState, *, reason: str) -> Draft | None:
    """It could not be started. None: it has ended already."""
    return Draft(kind="failed", data={"reason": reason}, message=reason[:500]) if state.live else None


def lose(state: ExecState, *, reason: str) -> Draft | None:
    """Nobody can say any more what came of it. None: somebody has."""
    return Draft(kind="lost", data={"reason": reason}, message=reason[:500]) if state.live else None
