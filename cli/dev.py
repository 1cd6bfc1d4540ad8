"""``helmr dev``: everything on this machine in the foreground, and a task project that is deployed on every change."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli import dev_state
from cli.errors import INTERRUPTED, colour
from cli.options import Choice, Command, Flags, flags
from cli.output import STATUS_COLOURS, clock, json_line, note, span
from cli.process import Part, PartFailed, Stop, first_of
from cli.worker import ENGINES
from helmr.errors import Conflict, HelmrError, Unavailable
from helmr.events import RUN_KINDS
from helmr.subjects import JOURNAL_KINDS

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from helmr.config import Settings
    from helmr.events import RunEvent
    from helmr.models import Deployment

#: Seconds each part gets for an orderly stop; a second Ctrl-C cuts it to :data:`_HURRY`.
_GRACE = 28.0
_HURRY = 6.0
#: The kinds of event that say where a run stands; the others are the task's own.
_MILESTONES = frozenset(RUN_KINDS) - JOURNAL_KINDS - {"started"}


@click.command(cls=Command)
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--engine",
    type=Choice(ENGINES),
    default="docker",
    show_default=True,
    help="docker: a container for each workspace; process: plain processes, isolating nothing.",
)
@click.option("--slots", type=click.IntRange(1, 1000), help="Runs at a time; default: two for each processor.")
@click.option(
    "--http", metavar="[HOST:]PORT", help="Serve tokens and streams over HTTP there: see `helmr server --help`."
)
@click.option("--metrics", metavar="[HOST:]PORT", help="Serve the server's metrics to Prometheus there, likewise.")
@click.option("--otlp", metavar="URL", help="Tell an OpenTelemetry collector there of every run that ends, likewise.")
def dev(folder: Path | None, engine: str, slots: int | None, **server: str | None) -> None:
    """Run everything on this machine: NATS, control, the projector and a worker; deploy DIR whenever its files change.

    DIR is a task project; default: the one at or above this folder. Name what is not to be deployed in its .helmrignore,
    above all files that change all the time, like logs. Ctrl-C stops everything, a second one at once; the
    state stays in HELMR_HOME.
    """
    given = flags()
    settings = given.settings(folder)
    made = _Dev(given, settings, settings.require_root(), engine, slots, server=server)
    hurried = asyncio.run(made.run())
    if hurried:
        raise click.exceptions.Exit(INTERRUPTED)


class _Ready(msgspec.Struct, kw_only=True):
    """A part's line that says it is ready; see ``Ready`` of :mod:`cli.server` and :mod:`cli.worker`."""

    ready: bool
    part: str
    url: str = ""
    id: str = ""
    slots: int = 0
    engine: str = ""
    engine_version: str = ""
    http: str | None = None
    metrics: str | None = None
    isolated: bool = True
    notes: tuple[str, ...] = ()


class _Dev:
    """One session of development."""

    def __init__(
        self,
        given: Flags,
        settings: Settings,
        root: Path,
        engine: str,
        slots: int | None,
        *,
        server: Mapping[str, str | None],
    ) -> None:
        self.settings = settings
        self.project = settings.require_project()
        self.root = root
        self.home = settings.home
        self._json = given.json
        self._url: str | None = None
        self._stop = Stop()
        self._failure: PartFailed | None = None
        self._left_out: list[str] = []
        loud = ["--debug"] if given.debug else ["--verbose"] if given.verbose else []
        self._common = ["--json", "--home", str(self.home), *loud]
        self._worker_options = ["--engine", engine, *(["--slots", str(slots)] if slots else [])]
        self._server_options = [f"--{name}={value}" for name, value in server.items() if value is not None]
        # The parts must not stand on what a variable or the project's file says: they stand on each other.
        env = {name: value for name, value in os.environ.items() if name != "HELMR_URL"}
        keyless = {name: value for name, value in env.items() if name != "HELMR_SECRET_KEY"}
        common: dict[str, Any] = {"fragile": True, "died": lambda text: self._tell("died", text)}
        self._server = Part("server", self._server_command, self._hears("server"), env=env, **common)
        self._worker = Part("worker", self._worker_command, self._hears("worker"), env=keyless, **common)

    async def run(self) -> bool:
        """Run until a signal comes; True when a second one did.

        Raises:
            Conflict: a server runs already in this home folder.
            PartFailed: a part could not be started at all.
        """
        self._stop.listen()
        self._refuse_second()
        if os.environ.get("HELMR_URL"):
            self._tell("note", "HELMR_URL is ignored: `helmr dev` runs a server of its own")
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._live(tasks)
                finally:
                    await asyncio.shield(self._shut_down())
        finally:
            dev_state.remove(self.home)
        if self._failure is not None:
            raise self._failure
        return self._stop.hurried.is_set()

    async def _keep(self, part: Part) -> None:
        """Run a part; one that cannot be started at all is a reason to stop the others, in order."""
        try:
            await part.run()
        except PartFailed as failure:
            self._failure = self._failure or failure
            self._stop.asked.set()

    async def _live(self, tasks: asyncio.TaskGroup) -> None:
        tasks.create_task(self._keep(self._server))
        await first_of(self._server.ready, self._stop.asked)
        if self._stop.asked.is_set():
            return
        self._note_state()
        tasks.create_task(self._keep(self._worker))
        project = tasks.create_task(self._mind_project())
        try:
            await self._stop.asked.wait()
        finally:
            project.cancel()

    def _note_state(self) -> None:
        settings, left_out = self.settings, tuple(self._left_out)
        dev_state.write(self.home, root=self.root, project=self.project, env=settings.env, left_out=left_out)

    async def _mind_project(self) -> None:
        from cli.redeploy import Redeployer
        from helmr import subjects
        from helmr.client.aio import AsyncClient

        settings = self.settings
        client = AsyncClient(
            self._url, api_key=settings.api_key, project=self.project, env=settings.env, home=self.home
        )
        async with client, client.wire.subscribe(subjects.live(client.scope, "run"), self._on_event):
            await Redeployer(client, self.root, self._on_deployed, self._on_failed, self._on_left_out).run()

    async def _shut_down(self) -> None:
        if self._failure is None:
            self._tell("stopping", "stopping; Ctrl-C again to hurry")
        await self._end(self._worker)
        await self._end(self._server)
        if self._failure is None:
            self._tell("stopped", f"stopped; the state stays in {self.home}")

    async def _end(self, part: Part) -> None:
        ending = asyncio.create_task(part.stop(_GRACE))
        hurried = asyncio.create_task(self._stop.hurried.wait())
        await asyncio.wait({ending, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ending.done():
            part.signal(signal.SIGTERM)  # the second one: the part hurries, too
            await asyncio.wait({ending}, timeout=_HURRY)
            part.signal(signal.SIGKILL)
        await ending

    # The parts

    def _refuse_second(self) -> None:
        from helmr import local

        try:
            url = local.find(self.home)
        except Unavailable:
            return
        hint = "use it (`helmr deploy`, `helmr status`), stop it first, or set HELMR_HOME to another folder"
        raise Conflict(f"a Helmr server runs already in {self.home}: {url}", hint=hint)

    def _server_command(self) -> list[str]:
        # After a restart on the same port, so that every connection comes back by itself.
        port = ["--port", self._url.rpartition(":")[2]] if self._url else []
        return [sys.executable, "-m", "cli.main", "server", *self._common, *self._server_options, *port]

    def _worker_command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "cli.main",
            "worker",
            *self._common,
            "--url",
            self._url or "",
            "--drain=0",  # whoever develops does not want to wait; the runs go on at the next start
            *self._worker_options,
        ]

    def _hears(self, name: str) -> Any:
        def listen(line: str) -> bool:
            ready = _ready(line)
            if ready is not None:
                self._on_ready(ready)
            elif line:
                self._tell("part", f"{name}: {line}", dim=True, part=name, line=line)
            return ready is not None

        return listen

    # What is told

    def _tell(self, what: str, text: str, *, dim: bool = False, **facts: Any) -> None:
        now = datetime.now(UTC)
        if self._json:
            json_line({"at": now, "what": what, "text": click.unstyle(text), **facts})
        else:
            note(f"{clock(now)} {text}", dim=dim)

    def _on_ready(self, ready: _Ready) -> None:
        if ready.part == "server":
            self._url = ready.url
            http = f", tokens and streams over HTTP at {ready.http}" if ready.http else ""
            metrics = f", metrics at {ready.metrics}" if ready.metrics else ""
            pid, text = self._server.pid, f"server at {ready.url}, home {self.home}{http}{metrics}"
            self._tell("ready", text, part="server", pid=pid, url=ready.url)
            return
        notes = f" ({', '.join(ready.notes)})" if ready.notes and ready.isolated else ""
        text = f"worker {ready.id}: {ready.engine} {ready.engine_version}{notes}, {ready.slots} slots"
        facts = {"worker": ready.id, "engine": ready.engine, "slots": ready.slots}
        self._tell("ready", text, dim=False, part="worker", pid=self._worker.pid, **facts)

    def _on_deployed(self, deployment: Deployment, new: bool) -> None:
        tasks = [task["id"] for task in deployment.index.get("tasks", ())]
        how = "deployed" if new else "is current, nothing has changed"
        text = f"{self.project}/{self.settings.env} {deployment.version} {how}: {', '.join(tasks)}"
        self._tell("deployed", text, version=deployment.version, deployment=deployment.id, tasks=tasks, new=new)

    def _on_failed(self, error: HelmrError) -> None:
        label = click.style("not deployed:", fg="red", bold=True) if colour(sys.stderr) else "not deployed:"
        hint = f"\n         hint: {error.hint}" if error.hint else ""
        self._tell("deploy_failed", f"{label} {error.message}{hint}", error=error.to_dict())

    def _on_left_out(self, name: str) -> None:
        from helmr.project import IGNORE_FILE

        self._left_out.append(name)
        self._note_state()
        text = f"{name} keeps changing as soon as it is deployed: from now on it is deployed only together with other changes"
        hint = (
            f"if tasks do not need it, name it in {IGNORE_FILE}; if they do, start `helmr dev` again when it is at rest"
        )
        self._tell("left_out", f"{text}\n         hint: {hint}", file=name)

    def _on_event(self, msg: Msg) -> None:
        from helmr.events import RunEvent
        from helmr.models import event_record

        event = msgspec.json.decode(msg.data, type=RunEvent)
        if event.kind in _MILESTONES:
            self._tell("event", _milestone(event), event=event_record(event))


def _ready(line: str) -> _Ready | None:
    if not line.startswith('{"ready":'):
        return None
    return msgspec.json.decode(line, type=_Ready)


def _milestone(event: RunEvent) -> str:
    """A line about a run: ``run_… hello succeeded 1.2s``."""
    state, data = event.state, event.data
    match event.kind:
        case "leased":
            more = f"on {state.lease.worker}" if state.lease else ""
        case "queued":
            more = "" if data.get("cause", "start") == "start" else f"({data['cause']})"
        case "failed":
            failure = data.get("failure", {})
            more = f"{failure.get('code')}: {failure.get('message')}"
        case _:
            more = event.message if event.message != event.kind else ""
    if state.terminal:
        more = f"{span(state.started_at or state.created_at, event.at)} {more}"
    kind = click.style(event.kind, fg=STATUS_COLOURS.get(event.kind)) if colour(sys.stderr) else event.kind
    return f"{event.run_id} {state.task_id} {kind} {more}".rstrip()
