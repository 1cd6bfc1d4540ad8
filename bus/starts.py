"""From a start request to the events that carry it out: everything that can be refused is refused here, before a run exists."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec

from bus import attachment
from bus.declared import check_payload, check_queue, find_sandbox, find_task, secret_names
from bus.deployments import Deployments
from bus.log import WORKSPACE, Log
from bus.presence import Presence
from bus.queueing import DEFAULT_GROUP, Gate
from bus.values import Values
from bus.vault import Vault, hint_to_set
from helmr import events, ids
from helmr.errors import NotFound, TooLarge, UsageError
from helmr.events import (
    INLINE_VALUE,
    ArtifactRef,
    Draft,
    RetryPolicy,
    RunSpec,
    SessionEvent,
    SessionState,
    WorkspaceState,
)
from helmr.models import Deployment, Session, session_record
from helmr.reducers import run as run_rules
from helmr.reducers import session as session_rules
from helmr.reducers import workspace as workspace_rules
from helmr.subjects import Scope
from helmr.tags import check_tags

#: Limits of DESIGN, "The run": bytes of JSON, numbers, seconds.
MAX_METADATA = 256 * 1024
MIN_DURATION, MAX_DURATION = 5.0, 86_400.0
MAX_KEY_LENGTH = 512
MIN_EXPIRY, MAX_EXPIRY = 1.0, 365 * 86_400.0


class StartRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a client sends to start a session; durations in seconds. A retry repeats ``request_id``."""

    task: str
    request_id: str
    payload: Any = None
    #: Of a payload too large for a request: the parts of its JSON that were put before, by their sha-256, in order.
    payload_parts: list[str] = []
    payload_artifact: ArtifactRef | None = None  #: what became of the parts
    external_id: str | None = None
    workspace: str | None = None
    queue: str | None = None
    concurrency_key: str | None = None
    priority: int = 0
    ttl: float | None = None
    max_duration: float | None = None
    expires_in: float | None = None
    metadata: dict[str, Any] = {}
    tags: list[str] = []


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The drafts of one start."""

    session_id: str
    workspace_id: str
    run_id: str
    fingerprint: str
    spec: RunSpec
    session: Draft
    workspace: Draft | None
    run: Draft
    ttl: float | None

    @property
    def opened(self) -> SessionState:
        """The session's state once its event is stored."""
        return session_rules.apply(None, "opened", self.session.data, events.now(), session_id=self.session_id)

    def session_preview(self, scope: Scope) -> Session:
        """The session record before its event is stored."""
        return session_record(*scope, self.opened, "queued")


class _Names(NamedTuple):
    """The ids of what a start makes."""

    session: str
    workspace: str
    run: str


class Planner:
    """Turns requests into plans."""

    def __init__(
        self, log: Log, deployments: Deployments, presence: Presence, gate: Gate, vault: Vault, *, values: Values
    ) -> None:
        self.log = log
        self.values = values
        self.deployments = deployments
        self.presence = presence
        self.vault = vault
        self._gate = gate

    async def plan(self, scope: Scope, request: StartRequest) -> Plan:
        """Check everything and decide on ids and events.

        Raises:
            NotFound: no deployment, task, sandbox or workspace of that name.
            PayloadInvalid, TooLarge, UsageError: the request is wrong.
            Conflict: the workspace does not fit the task.
        """
        deployment = self.deployments.current(scope)
        check_limits(request)
        task = find_task(deployment, request.task)
        check_queue(deployment, request.queue)
        if request.payload_parts:
            request = await self._join(request, deployment, task)
        else:
            check_payload(deployment, task, request.payload)
        await self._check_secrets(scope, task["id"], secret_names(deployment, task))
        named = _names(scope, request)
        opened = {
            "task_id": task["id"],
            "workspace_id": named.workspace,
            "deployment_id": deployment.id,
            "run_id": named.run,
            "external_id": request.external_id,
            "fingerprint": fingerprint(request),
            "tags": request.tags,
            "metadata": request.metadata,
            "expires_at": _expiry(request),
            "start": _rest_of(request),
        }
        session = Draft(kind="opened", data=opened, message=f"opened for task {task['id']}")
        return await self._assemble(scope, request, deployment, task, named=named, session=session)

    async def _join(self, request: StartRequest, deployment: Deployment, task: dict[str, Any]) -> StartRequest:
        """The request with its large payload stored in one piece, if it fits the task.

        It is checked in a thread, because others want answers.
        """
        body = await self.values.join(request.payload_parts)

        def check() -> None:
            try:
                check_payload(deployment, task, msgspec.json.decode(body))
            except msgspec.DecodeError as error:
                raise UsageError(f"the parts of the payload make no JSON: {error}") from error

        await asyncio.to_thread(check)
        reference = await self.values.put(body)
        return msgspec.structs.replace(request, payload=None, payload_parts=[], payload_artifact=reference)

    async def again(self, scope: Scope, opened: SessionEvent) -> Plan:
        """The plan that a session was opened by, whoever made it: same ids, same deployment, same run.

        Raises:
            NotFound: the deployment, or the workspace it was started on, is gone; or an older version opened the session.
        """
        state = opened.state
        if "start" not in opened.data:
            raise NotFound(f"session {state.id} does not say how its run was to be started")
        deployment = await self.deployments.load(scope, state.deployment_id)
        known = {name: opened.data.get(name) for name in ("external_id", "tags", "metadata")}
        body = {"task": state.task_id, "request_id": "", **known, **opened.data["start"]}
        request = msgspec.convert(body, StartRequest)
        named = _Names(session=state.id, workspace=state.workspace_id, run=state.run_id)
        session = Draft(kind="opened", data=opened.data, message=opened.message)
        task = find_task(deployment, state.task_id)
        return await self._assemble(scope, request, deployment, task, named=named, session=session)

    async def _assemble(
        self,
        scope: Scope,
        request: StartRequest,
        deployment: Deployment,
        task: dict[str, Any],
        *,
        named: _Names,
        session: Draft,
    ) -> Plan:
        workspace, lane = await self._workspace(scope, request, deployment, task)
        spec = run_spec(request, deployment, task, session_id=named.session, workspace_id=named.workspace)
        limit = self._gate(scope, named.run, spec, lane)
        return Plan(
            session_id=named.session,
            workspace_id=named.workspace,
            run_id=named.run,
            fingerprint=session.data["fingerprint"],
            spec=spec,
            session=session,
            workspace=workspace,
            run=run_rules.create(spec, cause="start", lane=lane, limit=limit),
            ttl=spec.ttl,
        )

    async def _check_secrets(self, scope: Scope, task_id: str, names: tuple[str, ...]) -> None:
        missing = await self.vault.missing(scope, names)
        if missing:
            others = f"; nor is {', '.join(missing[1:])}" if len(missing) > 1 else ""
            raise UsageError(
                f"task {task_id} needs the secret {missing[0]}, which is not set{others}",
                hint=hint_to_set(missing[0]),
                details={"missing": missing},
            )

    async def _workspace(
        self,
        scope: Scope,
        request: StartRequest,
        deployment: Deployment,
        task: dict[str, Any],
    ) -> tuple[Draft | None, str]:
        """The event that makes the workspace, unless it exists, and the lane of its run."""
        sandbox = find_sandbox(deployment, task["sandbox"])
        if request.workspace is None:
            draft = workspace_rules.create(
                sandbox=sandbox["name"],
                fingerprint=sandbox["fingerprint"],
                deployment_id=deployment.id,
                mount_path=sandbox["mount_path"],
            )
            return draft, DEFAULT_GROUP
        state = (await self.log.present(WORKSPACE, scope, request.workspace)).state
        attachment.check(state, request.task, await self._made_from(scope, state, sandbox), sandbox)
        lane = workspace_rules.lane(state, group=DEFAULT_GROUP, alive=set(self.presence.alive()))
        return None, lane

    async def _made_from(self, scope: Scope, state: WorkspaceState, sandbox: dict[str, Any]) -> dict[str, Any]:
        """The sandbox of a workspace, as it was deployed when it was given to it."""
        if state.fingerprint == sandbox["fingerprint"] and state.sandbox == sandbox["name"]:
            return sandbox
        return find_sandbox(await self.deployments.load(scope, state.deployment_id), state.sandbox)


def check_limits(request: StartRequest) -> None:
    """Refuse what exceeds a documented limit."""
    if not ids.is_id(request.request_id, "req"):
        raise UsageError(
            f"{request.request_id[:80]!r} is no request id", hint="use helmr.ids.new('req'), once per start"
        )
    _check_size("the payload", request.payload, INLINE_VALUE)
    _check_size("the metadata", request.metadata, MAX_METADATA)
    check_tags(request.tags)
    for name, key in (("external id", request.external_id), ("concurrency key", request.concurrency_key)):
        if key is not None and not 0 < len(key) <= MAX_KEY_LENGTH:
            raise UsageError(f"the {name} must have 1 to {MAX_KEY_LENGTH} characters")
    if request.max_duration is not None and not MIN_DURATION <= request.max_duration <= MAX_DURATION:
        raise UsageError(
            f"max duration {request.max_duration:g} s is out of range",
            hint=f"choose between {MIN_DURATION:g} s and {MAX_DURATION:g} s (24 h)",
        )
    if request.ttl is not None and request.ttl <= 0:
        raise UsageError("ttl must be positive")
    if request.expires_in is not None and not MIN_EXPIRY <= request.expires_in <= MAX_EXPIRY:
        raise UsageError(
            f"a session cannot expire in {request.expires_in:g} s",
            hint=f"choose between {MIN_EXPIRY:g} s and {MAX_EXPIRY:g} s (365 d), or leave it out: then it never does",
        )


def _check_size(what: str, value: Any, limit: int) -> None:
    size = len(msgspec.json.encode(value))
    if size > limit:
        raise TooLarge(
            f"{what} is {size} bytes of JSON; the limit is {limit}", hint="pass a reference to the data instead"
        )


def run_spec(
    request: StartRequest, deployment: Deployment, task: dict[str, Any], *, session_id: str, workspace_id: str
) -> RunSpec:
    """What the run is started with: the task's own settings, overridden by the request."""
    retry = task.get("retry")
    return RunSpec(
        session_id=session_id,
        workspace_id=workspace_id,
        deployment_id=deployment.id,
        deployment_version=deployment.version,
        task_id=task["id"],
        payload=request.payload,
        payload_artifact=request.payload_artifact,
        metadata=request.metadata,
        tags=tuple(sorted(set(request.tags))),
        secrets=secret_names(deployment, task),
        max_duration=request.max_duration or task["max_duration"],
        ttl=request.ttl or task.get("ttl"),
        retry=msgspec.convert(retry, RetryPolicy) if retry else None,
        cancel_grace=task.get("cancel_grace", 10.0),
        on_worker_lost=task.get("on_worker_lost", "redispatch"),
        queue=request.queue or task.get("queue"),
        concurrency_key=request.concurrency_key,
        priority=request.priority,
        external_id=request.external_id,
        park_after=task.get("park_after", 60.0),
    )


def _names(scope: Scope, request: StartRequest) -> _Names:
    """Derived from the request, so that the same request sent again is the same start."""
    at_ms = ids.time_ms(request.request_id)
    if request.external_id is None:
        session = ids.derive("ses", *scope, request.request_id, at_ms=at_ms)
    else:
        session = ids.derive("ses", *scope, "external", request.external_id)
    workspace = request.workspace or ids.derive("ws", *scope, request.request_id, at_ms=at_ms)
    return _Names(session=session, workspace=workspace, run=ids.derive("run", *scope, request.request_id, at_ms=at_ms))


#: Of a start request, what the event ``opened`` says in words of its own, and what concerns that one request only.
_SAID_ELSEWHERE = ("task", "request_id", "external_id", "expires_in", "metadata", "tags", "payload_parts")


def _expiry(request: StartRequest) -> str | None:
    return None if request.expires_in is None else (events.now() + timedelta(seconds=request.expires_in)).isoformat()


def _rest_of(request: StartRequest) -> dict[str, Any]:
    """What else is needed to make the session's first run, should control die before it has."""
    body: dict[str, Any] = msgspec.to_builtins(request)
    return {name: value for name, value in body.items() if value is not None and name not in _SAID_ELSEWHERE}


def fingerprint(request: StartRequest) -> str:
    """A digest of what was asked for, the same whenever the same start is asked for again."""
    body = msgspec.to_builtins(request)
    del body["request_id"]
    del body["payload_parts"]
    for late in ("expires_in", "payload_artifact"):  # they came later than fingerprints that are kept
        if body[late] is None:
            del body[late]
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()[:32]
