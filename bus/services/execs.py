"""Execs: programs that people run in workspaces. Control decides where, and the rest is between client and worker.

The client chooses the id, so that it can listen before there is anything to hear. Asking twice with the same id starts nothing
twice: an exec begins with its first event, and only the worker that has appended that may execute it. What became of an exec
whose worker is gone is settled when somebody asks about it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats.errors

from bus import topology
from bus.exec_output import read_output
from bus.log import EXEC, Log, Position
from bus.placement import Place, Placement
from bus.presence import Presence
from bus.services.endpoint import Endpoint
from bus.stored import Superseded, get_message
from helmr import errors, events, exec_frames, ids, subjects
from helmr.errors import Conflict, NotFound, TooLarge, Unavailable, UsageError
from helmr.events import Draft, ExecEvent, ExecState
from helmr.models import Exec, ExecChunk, exec_record
from helmr.reducers import exec as rules
from helmr.subjects import Scope

#: Bytes of command line and environment together; more does not belong into them.
MAX_REQUEST = 512 * 1024
#: Seconds a worker gets to accept an exec, or to answer about one.
_ACCEPT_TIMEOUT = 10.0
_ANSWER_TIMEOUT = 2.0
#: Seconds after which a worker must know of an exec that was created for it.
_KNOWN_AFTER = 10.0
#: Bytes of output in one page: base64 makes them a third larger, and a reply must stay far below max_payload.
_PAGE_BYTES = 512 * 1024
_MAX_LISTED = 1000
MAX_TERMINAL = 1000


class ExecSpec(msgspec.Struct, kw_only=True):
    """What is to be executed: ``argv``, or a copy of files (``transfer``, see :mod:`helmr.guest.transfer`).

    ``rows`` and ``columns`` ask for a terminal. Without ``kept``, output is passed on and not stored. With a ``client`` the
    exec is ended when that is gone.
    """

    id: str
    workspace: str
    argv: tuple[str, ...] = ()
    transfer: dict[str, Any] | None = None
    env: dict[str, str] = {}
    cwd: str | None = None
    input: bool = False
    rows: int | None = None
    columns: int | None = None
    kept: bool = True
    client: str | None = None


class ExecOrder(ExecSpec, kw_only=True):
    """What control asks of a worker: to append ``created``, and execute what that says.

    ``deployment`` and ``sandbox`` are those of the workspace, which control has just read.
    """

    project: str
    environment: str
    deployment: str
    sandbox: str
    created: Draft


class ExecRef(msgspec.Struct, kw_only=True):
    """A request that names an exec."""

    id: str


class ListRequest(msgspec.Struct, kw_only=True):
    """The newest execs, of one workspace or of all."""

    workspace: str | None = None
    limit: int = 50


class KillRequest(msgspec.Struct, kw_only=True):
    """Send a signal to the main process; without one, end all of it within ``grace`` seconds."""

    id: str
    signal: int | None = None
    grace: float = 2.0


class OutputRequest(msgspec.Struct, kw_only=True):
    """Output stored beyond sequence ``after``; with a ``stream``, from an ``offset`` of it on."""

    id: str
    stream: str | None = None
    offset: int | None = None
    after: int = 0


class OutputPage(msgspec.Struct, kw_only=True):
    """Chunks in the order they were stored; ``more``: ask again after the last ``seq``."""

    chunks: list[ExecChunk]
    more: bool


class Execs:
    """The exec service."""

    def __init__(self, log: Log, presence: Presence) -> None:
        self.log = log
        self.presence = presence
        self.placement = Placement(log, presence)

    def endpoints(self) -> list[Endpoint]:
        """What this service answers."""
        return [
            Endpoint("exec", "create", ExecSpec, self.create),
            Endpoint("exec", "get", ExecRef, self.get),
            Endpoint("exec", "list", ListRequest, self.newest),
            Endpoint("exec", "output", OutputRequest, self.output),
            Endpoint("exec", "kill", KillRequest, self.kill),
        ]

    async def create(self, scope: Scope, request: ExecSpec) -> Exec:
        """Have an exec started, or find the one that this request has made before.

        Raises:
            Conflict: the id is that of a different exec, or the workspace is deleted.
            Unavailable: no worker can have the workspace.
        """
        _check(request)
        asked = {**msgspec.to_builtins(request), "client": None}
        existing, place = await asyncio.gather(
            self.log.last(EXEC, scope, request.id),
            self.placement.find(scope, request.workspace),
            return_exceptions=True,
        )
        if isinstance(existing, BaseException):
            raise existing
        state: ExecState | None = existing.state
        if state is None:
            if isinstance(place, BaseException):  # which is of no interest if the exec is there
                raise place
            state = await self._order(scope, request, place, asked)
        if state.fingerprint != rules.fingerprint(asked):
            raise Conflict(f"{request.id} is an exec already, and another one", hint="use another idempotency key")
        return exec_record(*scope, state)

    async def _order(self, scope: Scope, request: ExecSpec, place: Place, asked: dict[str, Any]) -> ExecState:
        """Have a worker begin, and say how it is then; or how it is that somebody else has begun meanwhile."""
        draft = rules.create(
            workspace_id=request.workspace,
            worker=place.worker,
            argv=request.argv or _described(request.transfer or {}),
            cwd=request.cwd,
            terminal=request.rows is not None,
            kept=request.kept,
            asked=asked,
        )
        order = ExecOrder(
            project=scope.project,
            environment=scope.environment,
            deployment=place.workspace.deployment_id,
            sandbox=place.workspace.sandbox,
            created=draft,
            **{name: getattr(request, name) for name in request.__struct_fields__},
        )
        try:
            return msgspec.convert(await self._ask(place.worker, "exec", order, _ACCEPT_TIMEOUT), ExecState)
        except Conflict:
            return (await self.log.present(EXEC, scope, request.id)).state
        except Unavailable as silence:
            return await self._bar(scope, request.id, draft, silence)

    async def _bar(self, scope: Scope, exec_id: str, draft: Draft, silence: Unavailable) -> ExecState:
        """See to it that an order which nobody has answered is not followed any more; if it has been, it has arrived."""
        try:
            created = await self.log.append(EXEC, scope, exec_id, Position(0, None), draft)
        except Superseded:
            return (await self.log.present(EXEC, scope, exec_id)).state
        reason = silence.message
        await self.log.transact(EXEC, scope, exec_id, lambda s: rules.fail(s, reason=reason), known=created)
        raise silence

    async def get(self, scope: Scope, request: ExecRef) -> Exec:
        """One exec; if its worker is gone, that is found out now."""
        event = await self.log.present(EXEC, scope, request.id)
        if event.state.live:
            event = await self._settle(scope, event)
        return exec_record(*scope, event.state)

    async def newest(self, scope: Scope, request: ListRequest) -> list[Exec]:
        """The newest execs."""
        found: list[Exec] = []
        for exec_id in reversed(await self._ids(scope, request.workspace)):
            found.append(await self.get(scope, ExecRef(id=exec_id)))
            if len(found) >= min(request.limit, _MAX_LISTED):
                break
        return found

    async def _ids(self, scope: Scope, workspace: str | None) -> list[str]:
        created, seq = subjects.created(scope, "exec"), 0
        found: list[str] = []
        while (message := await get_message(self.log.js, topology.RUNS, created, after=seq)) is not None:
            seq = message[0]
            event = EXEC.decode(message[1])
            if workspace in (None, event.state.workspace_id):
                found.append(event.exec_id)
        return found

    async def output(self, scope: Scope, request: OutputRequest) -> OutputPage:
        """A page of what an exec wrote.

        Raises:
            NotFound: that part is not kept (any more); says from where on it is.
        """
        state = (await self.log.present(EXEC, scope, request.id)).state
        stream, offset = request.stream, request.offset
        if offset is not None and stream is None:
            raise UsageError("an offset needs a stream: stdout or stderr")
        chunks, more = await self._page(scope, request)
        if offset is not None and request.after == 0:
            total = getattr(state, stream or "stdout")
            _check_kept(state, stream or "stdout", offset, chunks[0].offset if chunks else total)
        while offset is not None and chunks and more and _end(chunks[-1]) <= offset:
            chunks, more = await self._page(scope, msgspec.structs.replace(request, after=chunks[-1].seq))
        return OutputPage(chunks=[each for each in chunks if offset is None or _end(each) > offset], more=more)

    async def _page(self, scope: Scope, request: OutputRequest) -> tuple[list[ExecChunk], bool]:
        return await read_output(
            self.log.js, scope, request.id, stream=request.stream, after=request.after, limit=_PAGE_BYTES
        )

    async def kill(self, scope: Scope, request: KillRequest) -> Exec:
        """Signal an exec, or end it. Ending one that has ended is fine.

        Raises:
            Conflict: it has ended, and cannot be signalled.
        """
        found = await self.get(scope, ExecRef(id=request.id))
        if not found.ended:
            try:
                await self._ask(found.worker, "exec-kill", request, _ANSWER_TIMEOUT)
            except NotFound:  # it has just ended, or never arrived
                found = await self.get(scope, ExecRef(id=request.id))
        if found.ended and request.signal is not None:
            raise Conflict(f"exec {found.id} has ended: it is {found.status}")
        return found

    async def _settle(self, scope: Scope, event: ExecEvent) -> ExecEvent:
        """An exec that nobody serves any more is lost."""
        state = event.state
        reason = None
        if await self.presence.confirm_gone(state.worker):
            reason = f"its worker {state.worker} was lost"
        elif (events.now() - event.at).total_seconds() > _KNOWN_AFTER and await self._is_unknown(scope, state):
            reason = f"worker {state.worker} does not know it (any more)"
        if reason is None:
            return event
        lost = await self.log.transact(EXEC, scope, state.id, lambda s: rules.lose(s, reason=reason))
        return lost.event or event

    async def _is_unknown(self, scope: Scope, state: ExecState) -> bool:
        """Whether its worker is there, and does not listen to what is said to it."""
        frame = exec_frames.encode(exec_frames.Ack("", 0, 0))
        try:
            await self.log.nc.request(subjects.exec_input(scope, state.id), frame, timeout=_ANSWER_TIMEOUT)
        except nats.errors.NoRespondersError:
            return await self._is_there(state.worker)
        except (TimeoutError, nats.errors.Error):
            return False
        return False

    async def _is_there(self, worker: str) -> bool:
        try:
            await self.log.nc.request(subjects.worker(worker, "ping"), timeout=_ANSWER_TIMEOUT)
        except (TimeoutError, nats.errors.Error):
            return False
        return True

    async def _ask(self, worker: str, verb: str, body: Any, timeout: float) -> Any:  # noqa: ASYNC109
        try:
            reply = await self.log.nc.request(subjects.worker(worker, verb), msgspec.json.encode(body), timeout=timeout)
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"worker {worker} does not answer", hint="see `helmr status`; try again") from error
        answer = msgspec.json.decode(reply.data)
        if "error" in answer:
            raise errors.from_dict(answer["error"])
        return answer["result"]


def _check(request: ExecSpec) -> None:
    if not any(ids.is_id(request.id, prefix) for prefix in ("exec", "pty")):
        raise UsageError(f"{request.id[:80]!r} is no id of an exec", hint="use helmr.ids.new('exec')")
    if bool(request.argv) == (request.transfer is not None):
        raise UsageError("say what to execute", hint="a program and its arguments")
    if any("\0" in word for word in (*request.argv, *request.env, *request.env.values(), request.cwd or "")):
        raise UsageError("neither arguments nor environment can contain a zero byte")
    if any(not name or "=" in name for name in request.env):
        raise UsageError("a variable of the environment needs a name, without =")
    size = len(msgspec.json.encode((request.argv, request.env)))
    if size > MAX_REQUEST:
        raise TooLarge(
            f"command and environment are {size} bytes; the limit is {MAX_REQUEST}", hint="use stdin or a file"
        )
    if not all(size is None or 0 < size <= MAX_TERMINAL for size in (request.rows, request.columns)):
        raise UsageError(f"a terminal has 1 to {MAX_TERMINAL} rows and columns")


def _described(transfer: dict[str, Any]) -> tuple[str, ...]:
    return ("(copy out)" if transfer.get("op") == "send" else "(copy in)", str(transfer.get("path", "")))


def _end(chunk: ExecChunk) -> int:
    return chunk.offset + len(chunk.data)


def _check_kept(state: ExecState, stream: str, offset: int, earliest: int | None) -> None:
    if earliest is None or offset >= earliest:
        return
    what = "was never kept" if not state.kept else "is not kept any more"
    raise NotFound(
        f"{stream} of exec {state.id} before byte {earliest} {what}",
        hint=f"the earliest there is: --offset {earliest}",
        details={"earliest": earliest},
    )
