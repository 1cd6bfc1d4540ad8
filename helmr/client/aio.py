"""The asynchronous client: one connection, one project and environment, and namespaces for what there is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from helmr import ids, local
from helmr.client.access import AccessTokens
from helmr.client.deployments import Deployments
from helmr.client.queues import Queues
from helmr.client.runs import Runs
from helmr.client.secrets import Secrets
from helmr.client.sessions import Sessions
from helmr.client.tokens import Tokens
from helmr.client.wire import Wire
from helmr.client.workspaces import Workspaces
from helmr.config import load
from helmr.durations import Duration, seconds
from helmr.errors import Conflict, NotFound, TimedOut, Unavailable, UsageError
from helmr.subjects import Scope

_PREFIXES = {"run": "run", "session": "ses", "workspace": "ws", "token": "tok", "access": "acc", "deployment": "dep"}
#: Seconds a query may take unless its caller says otherwise (the server has a limit of its own).
_QUERY_TIMEOUT = 30.0
_TRUNCATED = "Helmr-Truncated"


class _Resolved(msgspec.Struct):
    ids: list[str]


class AsyncClient:
    """Talks to Helmr; use as ``async with AsyncClient() as helmr``.

    Without arguments it finds its server and project as the CLI does: ``HELMR_URL``, ``HELMR_API_KEY``, ``HELMR_PROJECT``,
    ``HELMR_ENV``, ``helmr.toml``, or the local server of ``HELMR_HOME``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        project: str | None = None,
        env: str | None = None,
        home: Path | str | None = None,
    ) -> None:
        self.settings = load(url=url, api_key=api_key, project=project, env=env, home=home)
        self.scope = Scope(self.settings.require_project(), self.settings.env)
        self._wire: Wire | None = None
        self.sessions = Sessions(self)
        self.runs = Runs(self)
        self.tokens = Tokens(self)
        self.access = AccessTokens(self)
        self.workspaces = Workspaces(self)
        self.queues = Queues(self)
        self.deployments = Deployments(self)
        self.secrets = Secrets(self)

    @property
    def wire(self) -> Wire:
        """The connection; only inside the ``async with`` block."""
        if self._wire is None:
            raise UsageError("the client is not connected", hint="use it as `async with AsyncClient() as helmr`")
        return self._wire

    async def __aenter__(self) -> Self:
        url = self.settings.url or local.find(self.settings.home)
        self._wire = await Wire.connect(url, self.scope, token=self.settings.api_key)
        return self

    async def __aexit__(self, *_: object) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()

    async def resolve(self, entity: str, reference: str) -> str:
        """The full id for an id, a unique prefix of one, or ``@last``.

        Raises:
            NotFound: nothing begins like this.
            Conflict: several do.
        """
        if ids.is_id(reference, _PREFIXES[entity]):
            return reference
        body = {"entity": entity, "fresh": True}
        body |= {"last": True} if reference == "@last" else {"prefix": reference}
        found = (await self.wire.call("history", "resolve", body, _Resolved)).ids
        if len(found) == 1:
            return found[0]
        if not found:
            raise NotFound(f"no {entity} {reference} in {self.scope}", hint=f"list them with `helmr {entity} list`")
        raise Conflict(f"{reference} is the beginning of several ids", hint="write more of it: " + ", ".join(found))

    async def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        limit: int = 10_000,
        timeout: Duration = _QUERY_TIMEOUT,  # noqa: ASYNC109
    ) -> list[dict[str, Any]]:
        """Rows of one read-only SQL statement over the history; ``parameters`` are the values of its ``$name``.

        Raises:
            UsageError: the statement is refused, or wrong; says where.
            TimedOut: it takes longer than ``timeout``.
        """
        import pyarrow.ipc as ipc  # noqa: PLR0402  # the module does not say that it exports this one

        data = b"".join([part async for part in self.query_arrow(sql, parameters, limit=limit, timeout=timeout)])
        rows: list[dict[str, Any]] = ipc.open_stream(data).read_all().to_pylist()
        return rows

    async def query_arrow(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        limit: int = 10_000,
        timeout: Duration = _QUERY_TIMEOUT,  # noqa: ASYNC109
        on_truncated: Callable[[str], None] = lambda _: None,
    ) -> AsyncIterator[bytes]:
        """The same rows as an Arrow IPC stream, in parts; ``on_truncated`` is told which limit cut them off, if one did."""
        body = {"sql": sql, "parameters": dict(parameters or {}), "format": "arrow", "limit": limit}
        async for part in self._query(body, seconds(timeout), on_truncated):
            yield part

    async def query_json(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        limit: int = 10_000,
        timeout: Duration = _QUERY_TIMEOUT,  # noqa: ASYNC109
        fresh: bool = True,
    ) -> list[dict[str, Any]]:
        """The same rows as JSON values, for programs that do not load Arrow: times are RFC 3339 text.

        ``fresh=False`` may answer from a copy of the history that was taken up to ten seconds ago, which is quicker.
        """
        body = {"sql": sql, "parameters": dict(parameters or {}), "format": "json", "limit": limit, "fresh": fresh}
        data = b"".join([part async for part in self._query(body, seconds(timeout), lambda _: None)])
        head, *lines = data.splitlines()
        names = [column["name"] for column in msgspec.json.decode(head)["columns"]]
        return [dict(zip(names, msgspec.json.decode(line), strict=True)) for line in lines]

    async def _query(
        self, body: dict[str, Any], deadline: float, on_truncated: Callable[[str], None]
    ) -> AsyncIterator[bytes]:
        def end(headers: dict[str, str]) -> None:
            if limited := headers.get(_TRUNCATED):
                on_truncated(limited)

        body["timeout"] = deadline
        async for part in self.wire.parts("history", "query", body, timeout=deadline + 5, on_end=end):
            yield part

    async def status(self) -> dict[str, Any]:
        """What control and the projector say about themselves, under ``control`` and ``history``; None for one that is away."""
        answers: dict[str, Any] = {}
        for part, noun in (("control", "status"), ("history", "history")):
            verb = "get" if part == "control" else "status"
            try:
                answers[part] = await self.wire.call(noun, verb, {}, dict[str, Any], timeout=3)
            except (Unavailable, TimedOut):
                answers[part] = None
        return answers
