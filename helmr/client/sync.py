"""The blocking client: the asynchronous one on an event loop of its own, in a thread; same namespaces, same methods."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from helmr.access import Access, NewAccess
from helmr.chunks import LogChunk
from helmr.client import runs as aio_runs
from helmr.client.aio import AsyncClient
from helmr.client.execs import ExecResult
from helmr.client.runs import output_of, run_id_of
from helmr.client.secrets import Rotated
from helmr.client.sessions import Started as AioStarted
from helmr.client.streams import Input as AioInput
from helmr.client.streams import OpenSession as AioOpenSession
from helmr.client.streams import Output as AioOutput
from helmr.client.sync_execs import Execs
from helmr.client.workspaces import FileList, LeftOut, VersionList
from helmr.durations import Duration
from helmr.errors import UsageError
from helmr.explanation import Explanation
from helmr.models import (
    Collected,
    Deployment,
    Event,
    FileEntry,
    LiveRun,
    LogMatch,
    NewToken,
    Queue,
    Run,
    Session,
    StoredSecret,
    StreamRecord,
    Token,
    Workspace,
)

T = TypeVar("T")


class Client(AbstractContextManager["Client"]):
    """Talks to Helmr and blocks; use as ``with Client() as helmr``. See :class:`AsyncClient` for the arguments."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        project: str | None = None,
        env: str | None = None,
        home: Path | str | None = None,
    ) -> None:
        self.aio = AsyncClient(url, api_key=api_key, project=project, env=env, home=home)
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self.sessions = Sessions(self)
        self.runs = Runs(self)
        self.tokens = Tokens(self)
        self.access = AccessTokens(self)
        self.workspaces = Workspaces(self)
        self.queues = Queues(self)
        self.deployments = Deployments(self)
        self.secrets = Secrets(self)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(self._portal.wrap_async_context_manager(self.aio))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._portal = None
        self._stack.close()

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
        """The result of an asynchronous function, on the client's event loop."""
        if self._portal is None:
            raise UsageError("the client is not connected", hint="use it as `with Client() as helmr`")
        result: T = self._portal.call(lambda: function(*args, **kwargs))
        return result

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items of an asynchronous iterator, one by one."""
        done = object()

        async def step() -> Any:
            return await anext(items, done)

        while True:
            item = self.call(step)
            if item is done:
                return
            yield item

    def query(
        self, sql: str, parameters: Mapping[str, Any] | None = None, *, limit: int = 10_000, timeout: Duration = 30.0
    ) -> list[dict[str, Any]]:
        """See :meth:`AsyncClient.query`."""
        return self.call(self.aio.query, sql, parameters, limit=limit, timeout=timeout)

    def status(self) -> dict[str, Any]:
        """See :meth:`AsyncClient.status`."""
        return self.call(self.aio.status)


class RunHandle:
    """A run and what can be done with it; see :class:`helmr.client.runs.RunHandle`."""

    def __init__(self, client: Client, record: Run) -> None:
        self._client = client
        self.record = record
        self.id = record.id

    def __repr__(self) -> str:
        return f"RunHandle({self.id!r})"

    def wait(self, *, timeout: Duration | None = None) -> Run:
        """The run once it has ended, however it ended."""
        return self._client.runs.wait(self.id, timeout=timeout)

    def result(self, *, timeout: Duration | None = None) -> Any:
        """The run's output; raises RunFailed when it ended otherwise than succeeded."""
        return output_of(self.wait(timeout=timeout))

    def cancel(self, *, reason: str | None = None, force: bool = False) -> Run:
        """Ask for the run's end."""
        return self._client.runs.cancel(self.id, reason=reason, force=force)

    def events(self, *, after: int = 0) -> Iterator[Event]:
        """The run's events until the terminal one."""
        return self._client.runs.events.subscribe(self.id, after=after)

    def logs(self, *, follow: bool = True, stream: str | None = None) -> Iterator[LogChunk]:
        """What the run writes, until it ends."""
        return self._client.runs.logs(self.id, follow=follow, stream=stream)


class Started:
    """A started (or found) session, and a handle for its run."""

    def __init__(self, client: Client, started: AioStarted) -> None:
        self.session: Session = started.session
        self.run = RunHandle(client, started.run.record)
        self.reused = started.reused


AnyRun = str | Run | RunHandle


def _ref(run: AnyRun) -> str:
    return run.id if isinstance(run, RunHandle) else run_id_of(run)


class Sessions:
    """``client.sessions``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def start(self, task: Any, payload: Any = None, **options: Any) -> Started:
        """See :meth:`helmr.client.sessions.Sessions.start`, which lists the options."""
        return Started(self._client, self._client.call(self._client.aio.sessions.start, task, payload, **options))

    def get(self, session: str | Session) -> Session:
        """One session."""
        return self._client.call(self._client.aio.sessions.get, session)

    def list(self, *, status: str | None = None, task: str | None = None, limit: int = 50) -> list[Session]:
        """Sessions, newest first."""
        return self._client.call(self._client.aio.sessions.list, status=status, task=task, limit=limit)

    def open(self, session: str | Session) -> OpenSession:
        """The streams of a session: ``open(session).input("approval").send(…)``."""
        return OpenSession(self._client, self._client.aio.sessions.open(session))

    def close(self, session: str | Session) -> Session:
        """Take no more input."""
        return self._client.call(self._client.aio.sessions.close, session)

    def cancel(self, session: str | Session, *, reason: str | None = None) -> Session:
        """Cancel the session and its current run."""
        return self._client.call(self._client.aio.sessions.cancel, session, reason=reason)


class OpenSession:
    """The streams of one session, by name."""

    def __init__(self, client: Client, aio: AioOpenSession) -> None:
        self._client = client
        self._aio = aio

    def input(self, stream: str) -> Input:
        """An input stream."""
        return Input(self._client, self._aio.input(stream))

    def output(self, stream: str) -> Output:
        """An output stream."""
        return Output(self._client, self._aio.output(stream))


class Output:
    """A stream of a session; see :class:`helmr.client.streams.Output`."""

    def __init__(self, client: Client, aio: AioInput | AioOutput) -> None:
        self._client = client
        self._aio = aio
        self.name = aio.name

    def list(self, *, after: int = 0, limit: int = 500, correlation_id: str | None = None) -> list[StreamRecord]:
        """Records numbered beyond ``after``, oldest first."""
        return self._client.call(self._aio.list, after=after, limit=limit, correlation_id=correlation_id)

    def follow(self, *, after: int = 0, correlation_id: str | None = None) -> Iterator[StreamRecord]:
        """Records numbered beyond ``after``, stored ones first and then as they come, for ever."""
        return self._client.iterate(self._aio.follow(after=after, correlation_id=correlation_id))


class Input(Output):
    """An input stream of a session."""

    _aio: AioInput

    def send(self, data: Any, *, correlation_id: str | None = None, idempotency_key: str | None = None) -> StreamRecord:
        """Append one record; see :meth:`helmr.client.streams.Input.send`."""
        return self._client.call(self._aio.send, data, correlation_id=correlation_id, idempotency_key=idempotency_key)


class Runs:
    """``client.runs``"""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.events = Events(client)

    @property
    def _aio(self) -> aio_runs.Runs:
        return self._client.aio.runs

    def get(self, run: AnyRun) -> Run:
        """One run."""
        return self._client.call(self._aio.get, _ref(run))

    def live(self) -> Sequence[LiveRun]:
        """All runs that have not ended."""
        return self._client.call(self._aio.live)

    def list(self, **filters: Any) -> list[Run]:
        """Runs, newest first; see :meth:`helmr.client.runs.Runs.list` for the filters."""
        return self._client.call(self._aio.list, **filters)

    def wait(self, run: AnyRun, *, timeout: Duration | None = None) -> Run:
        """The run once it has ended."""
        return self._client.call(self._aio.wait, _ref(run), timeout=timeout)

    def explain(self, run: AnyRun) -> Explanation:
        """What a run is doing or why it is not, since when, and what would change that."""
        return self._client.call(self._aio.explain, _ref(run))

    def cancel(self, run: AnyRun, *, reason: str | None = None, force: bool = False) -> Run:
        """Ask for the end of a run."""
        return self._client.call(self._aio.cancel, _ref(run), reason=reason, force=force)

    def logs(self, run: AnyRun, *, follow: bool = False, stream: str | None = None) -> Iterator[LogChunk]:
        """What the run has written."""
        return self._client.iterate(self._aio.logs(_ref(run), follow=follow, stream=stream))

    def search(self, pattern: str, **filters: Any) -> Iterator[LogMatch]:
        """Lines in the logs of all runs; see :meth:`helmr.client.runs.Runs.search` for the filters."""
        return self._client.iterate(self._aio.search(pattern, **filters))


class Events:
    """``client.runs.events``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, run: AnyRun, *, after: int = 0, limit: int = 500) -> list[Event]:
        """Stored events with a cursor beyond ``after``."""
        return self._client.call(self._client.aio.runs.events.list, _ref(run), after=after, limit=limit)

    def subscribe(self, run: AnyRun, *, after: int = 0) -> Iterator[Event]:
        """The run's events until the terminal one."""
        return self._client.iterate(self._client.aio.runs.events.subscribe(_ref(run), after=after))


class Tokens:
    """``client.tokens``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, **options: Any) -> NewToken:
        """Make a token that no run made; see :meth:`helmr.client.tokens.Tokens.create`, which lists the options."""
        return self._client.call(self._client.aio.tokens.create, **options)

    def get(self, token: str | Token) -> Token:
        """One token."""
        return self._client.call(self._client.aio.tokens.get, token)

    def list(self, **filters: Any) -> list[Token]:
        """Tokens, newest first; see :meth:`helmr.client.tokens.Tokens.list`, which lists the filters."""
        return self._client.call(self._client.aio.tokens.list, **filters)

    def complete(self, token: str | Token, data: Any = None) -> Token:
        """Complete a token; the same data again changes nothing."""
        return self._client.call(self._client.aio.tokens.complete, token, data)

    def cancel(self, token: str | Token, *, reason: str | None = None) -> Token:
        """Cancel a token."""
        return self._client.call(self._client.aio.tokens.cancel, token, reason=reason)


class AccessTokens:
    """``client.access``; the options are those of :class:`helmr.client.access.AccessTokens`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def for_input(self, session: str | Session, stream: str, **options: Any) -> NewAccess:
        """Let whoever has the secret append to one input stream."""
        return self._client.call(self._client.aio.access.for_input, session, stream, **options)

    def for_output(self, session: str | Session, stream: str, **options: Any) -> NewAccess:
        """Let whoever has the secret read one output stream."""
        return self._client.call(self._client.aio.access.for_output, session, stream, **options)

    def for_token(self, token: str | Token, **options: Any) -> NewAccess:
        """Let whoever has the secret complete one token."""
        return self._client.call(self._client.aio.access.for_token, token, **options)

    def get(self, access: str | Access) -> Access:
        """One access token."""
        return self._client.call(self._client.aio.access.get, access)

    def list(self, **filters: Any) -> list[Access]:
        """Access tokens, newest first; perhaps only those in a ``status``, or for a ``session``; up to a ``limit``."""
        return self._client.call(self._client.aio.access.list, **filters)

    def revoke(self, access: str | Access, *, reason: str | None = None) -> Access:
        """End an access token now."""
        return self._client.call(self._client.aio.access.revoke, access, reason=reason)


class Workspaces:
    """``client.workspaces``"""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.execs = Execs(client)

    def exec(self, workspace: str | Workspace, argv: Sequence[str], **options: Any) -> ExecResult:
        """Run a program to its end; see :meth:`helmr.client.workspaces.Workspaces.exec` for the options."""
        return self._client.call(self._client.aio.workspaces.exec, workspace, argv, **options)

    def create(self, *, task: str | None = None, sandbox: str | None = None, **said: Any) -> Workspace:
        """A new, empty workspace of a sandbox of the current deployment; with ``tags`` and ``metadata``, if given."""
        return self._client.call(self._client.aio.workspaces.create, task=task, sandbox=sandbox, **said)

    def upload(self, workspace: str | Workspace, source: Path | str, path: str = "", *, ignore: bool = True) -> LeftOut:
        """Copy a local folder, file or link into a workspace; returns what was left out."""
        return self._client.call(self._client.aio.workspaces.upload, workspace, source, path, ignore=ignore)

    def download(self, workspace: str | Workspace, path: str, target: Path | str = ".") -> LeftOut:
        """Copy a folder, file or link out of a workspace; returns what was left out."""
        return self._client.call(self._client.aio.workspaces.download, workspace, path, target)

    def get(self, workspace: str | Workspace) -> Workspace:
        """One workspace."""
        return self._client.call(self._client.aio.workspaces.get, workspace)

    def list(self, *, tag: str | None = None, limit: int = 50) -> list[Workspace]:
        """Workspaces, newest first."""
        return self._client.call(self._client.aio.workspaces.list, tag=tag, limit=limit)

    def update(self, workspace: str | Workspace, **changes: Any) -> Workspace:
        """Change tags, metadata or sandbox; see :meth:`helmr.client.workspaces.Workspaces.update` for what can be given."""
        return self._client.call(self._client.aio.workspaces.update, workspace, **changes)

    def materialize(self, workspace: str | Workspace) -> Workspace:
        """Bring a workspace to life without a run."""
        return self._client.call(self._client.aio.workspaces.materialize, workspace)

    def stop(self, workspace: str | Workspace) -> Workspace:
        """End the container of a workspace; its files stay."""
        return self._client.call(self._client.aio.workspaces.stop, workspace)

    def versions(self, workspace: str | Workspace) -> VersionList:
        """The versions of a workspace, newest first."""
        return self._client.call(self._client.aio.workspaces.versions, workspace)

    def files(
        self, workspace: str | Workspace, path: str = "", *, version: str | None = None, recursive: bool = False
    ) -> FileList:
        """What is in a folder of a version."""
        files = self._client.aio.workspaces.files
        return self._client.call(files, workspace, path, version=version, recursive=recursive)

    def stat(self, workspace: str | Workspace, path: str, *, version: str | None = None) -> FileEntry:
        """One file, folder or link of a version."""
        return self._client.call(self._client.aio.workspaces.stat, workspace, path, version=version)

    def read(self, workspace: str | Workspace, path: str, *, version: str | None = None) -> Iterator[bytes]:
        """The content of a file of a version, piece by piece."""
        return self._client.iterate(self._client.aio.workspaces.read(workspace, path, version=version))

    def restore(self, workspace: str | Workspace, version: str) -> Workspace:
        """Have a workspace go on from one of its versions."""
        return self._client.call(self._client.aio.workspaces.restore, workspace, version)

    def delete(self, workspace: str | Workspace) -> Workspace:
        """Delete a workspace, its files, and in time its versions."""
        return self._client.call(self._client.aio.workspaces.delete, workspace)

    def collect(self, *, remove: bool = False) -> Collected:
        """What the store of versions holds and no version needs; removed on request."""
        return self._client.call(self._client.aio.workspaces.collect, remove=remove)

    def fork(self, workspace: str | Workspace, *, version: str | None = None, **said: Any) -> Workspace:
        """A new workspace that begins as a version of this one; with its ``tags`` and ``metadata``, unless given."""
        return self._client.call(self._client.aio.workspaces.fork, workspace, version=version, **said)


class Queues:
    """``client.queues``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Queue:
        """One queue: its limits, who has a slot, and how many wait, by concurrency key."""
        return self._client.call(self._client.aio.queues.get, name)

    def list(self) -> list[Queue]:
        """All queues of the environment, without ``holders`` and ``keys``."""
        return self._client.call(self._client.aio.queues.list)


class Deployments:
    """``client.deployments``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def deploy(self, root: Path, *, promote: bool = True) -> Deployment:
        """Deploy the task project in the folder ``root``."""
        return self._client.call(self._client.aio.deployments.deploy, root, promote=promote)

    def get(self, reference: str | None = None) -> Deployment:
        """A deployment; without a reference, the current one."""
        return self._client.call(self._client.aio.deployments.get, reference)

    def list(self) -> list[Deployment]:
        """Deployments, newest first."""
        return self._client.call(self._client.aio.deployments.list)

    def promote(self, reference: str) -> Deployment:
        """Make a deployment the current one."""
        return self._client.call(self._client.aio.deployments.promote, reference)


class Secrets:
    """``client.secrets``"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def set(self, name: str, value: str) -> StoredSecret:
        """Store a value under a name; see :meth:`helmr.client.secrets.Secrets.set`."""
        return self._client.call(self._client.aio.secrets.set, name, value)

    def get(self, name: str) -> StoredSecret:
        """What is known about a secret, which is not its value."""
        return self._client.call(self._client.aio.secrets.get, name)

    def list(self) -> list[StoredSecret]:
        """What is known about all secrets of the environment."""
        return self._client.call(self._client.aio.secrets.list)

    def delete(self, name: str) -> StoredSecret:
        """Remove a secret."""
        return self._client.call(self._client.aio.secrets.delete, name)

    def rotate(self) -> Rotated:
        """Encrypt the secrets of every environment with a new key."""
        return self._client.call(self._client.aio.secrets.rotate)
