"""``helmr server``: NATS, control and the projector as one program that lives until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cli.artifacts import artifacts_option, look_at
from cli.options import DURATION, Choice, Command, Flags, flags
from cli.output import json_line, note
from cli.process import Part, Stop, first_of
from helmr.errors import Conflict, Unavailable, UsageError

if TYPE_CHECKING:
    from nats.aio.client import Client as Nats

    from bus.control import Control
    from bus.exposition import Address
    from bus.s3_place import Place
    from bus.server import EmbeddedServer

log = logging.getLogger(__name__)

#: What the projector writes when it answers.
_PROJECTOR_READY = "helmr history ready"
#: Seconds that the projector gets to finish the batch it is writing.
_PROJECTOR_GRACE = 8.0
#: Seconds to wait for the projector before saying that the server is up without it.
_PROJECTOR_PATIENCE = 20.0
#: Seconds after the first signal at which the process ends whatever is still going on.
_LAST_RESORT = 25.0
#: Seconds that ended entities stay in the log at least: half-done starts are told from finished ones by that.
_MIN_RETENTION = 86_400.0


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What ``helmr server --json`` says once everything answers."""

    ready: bool = True
    part: str = "server"
    url: str
    pid: int
    home: str
    metrics: str | None = None  #: where Prometheus finds them, with --metrics
    http: str | None = None  #: where tokens are completed and streams served, with --http


_DAYS = click.IntRange(1, 36500)


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the NATS server listens on.")
@click.option("--port", type=click.IntRange(1, 65535), help="Its port; default: any free one.")
@click.option(
    "--durability",
    type=Choice(["strict", "relaxed"]),
    default="strict",
    show_default=True,
    help="strict syncs every message to disk; relaxed once a second: a power cut can lose that second.",
)
@click.option(
    "--retention",
    type=DURATION,
    default="7d",
    show_default=True,
    metavar="D",
    help="How long the log keeps what has ended, at least 1d; the history keeps it for good.",
)
@click.option(
    "--secret-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keys that secrets are encrypted with, one a line, the current one first; HELMR_SECRET_KEY holds them, too.",
)
@click.option(
    "--metrics",
    metavar="[HOST:]PORT",
    help="Serve metrics to Prometheus there; without a host, on 127.0.0.1. Needs helmr[metrics].",
)
@click.option(
    "--otlp",
    metavar="URL",
    help="Tell an OpenTelemetry collector there of every run that ends, e.g. http://127.0.0.1:4318. Needs helmr[otel].",
)
@click.option("--archive-after", type=_DAYS, metavar="DAYS", help="Move older events and logs to Parquet; default: 7.")
@click.option("--keep-logs", type=_DAYS, metavar="DAYS", help="Delete older logs from the history; default: 30.")
@click.option("--keep-events", type=_DAYS, metavar="DAYS", help="Delete older events from the history; default: never.")
@click.option(
    "--http",
    metavar="[HOST:]PORT",
    help="Complete tokens and serve streams over HTTP there, by secrets; without a host, on 127.0.0.1. Needs helmr[http].",
)
@artifacts_option
def server(
    host: str,
    *,
    port: int | None,
    durability: str,
    retention: float,
    secret_key_file: Path | None,
    artifacts: Place,
    metrics: str | None,
    otlp: str | None,
    http: str | None,
    **history: int | None,
) -> None:
    """Run NATS (unless --url or HELMR_URL names one), control and the projector, until SIGINT or SIGTERM.

    Without --secret-key-file and HELMR_SECRET_KEY the key of secrets is made when the first one is stored, and kept in
    HELMR_HOME/secret-key. Several servers on one NATS need to be given the same keys.
    """
    from bus.keyring import KeyRing

    given = flags()
    # Not the url of helmr.toml: that says where the Helmr of a project is, not what this server should stand on.
    url = given.url or os.environ.get("HELMR_URL") or None
    key_text = os.environ.pop("HELMR_SECRET_KEY", None) or None  # for nobody whom this process starts
    ring = KeyRing.find(given.settings().home, file=secret_key_file, text=key_text)
    options = {"host": host, "port": port, "durability": durability}
    if retention < _MIN_RETENTION:
        hint = "ended runs must stay long enough to be looked at: use 1d"
        raise UsageError("--retention is less than a day", hint=hint)
    kept = [f"--{name.replace('_', '-')}={days}" for name, days in history.items() if days is not None]
    control = {"ring": ring, "artifacts": artifacts, "retention": retention}
    made = _Server(given, url, control, metrics=metrics, otlp=otlp, http=http, embedded=options, history=kept)
    asyncio.run(made.run())


class _Server:
    """The life of one server."""

    def __init__(
        self,
        given: Flags,
        url: str | None,
        control: dict[str, Any],
        *,
        metrics: str | None,
        otlp: str | None,
        http: str | None,
        embedded: dict[str, Any],
        history: list[str],
    ) -> None:
        from bus.exposition import Address
        from bus.trace_export import exporter

        settings = given.settings()
        self.home: Path = settings.home
        self.token = settings.api_key
        self.json = given.json
        self._url = settings.url if url else None
        self._control_options = control
        self._history = history
        self._embedded_options = embedded
        self._metrics = Address.parse(metrics) if metrics else None
        self._traces = exporter(otlp) if otlp else None
        self._metrics_url: str | None = None
        self._http = Address.parse(http) if http else None
        self._http_url: str | None = None
        self._verbose = given.verbose or given.debug
        self._stop = Stop(last_resort=_LAST_RESORT)
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Live.

        Raises:
            ConfigError: the home folder, the port or the binary cannot be used.
            Unavailable: NATS does not come up, or is gone for good.
        """
        from helmr.config import ensure_home

        self._stop.listen()
        ensure_home(self.home)
        _refuse_second(self.home)
        await look_at(self._control_options["artifacts"])
        if self._url is not None:
            await self._stand_on(self._url, None)
            return
        from bus.server import EmbeddedServer

        embedded = EmbeddedServer(self.home, **self._embedded_options)
        await embedded.start()
        try:
            await self._stand_on(embedded.url, embedded)
        finally:
            await embedded.stop()

    async def _stand_on(self, url: str, embedded: EmbeddedServer | None) -> None:
        from bus.allocator import keep_buffers
        from helmr.connection import connect

        keep_buffers()
        _use_scratch(self.home / "tmp")

        async def closed() -> None:
            self._lost.set()

        nc = await connect(url, name="helmr-control", token=self.token, on_closed=closed)
        try:
            await self._parts(url, nc, embedded)
            lost = self._lost.is_set()
        finally:
            await nc.close()
        if lost and not self._stop.asked.is_set():
            raise Unavailable(f"the connection to {url} was closed for good", hint="start the server again")

    async def _parts(self, url: str, nc: Nats, embedded: EmbeddedServer | None) -> None:
        """Run the parts side by side; the end of one of them that may not end ends all."""
        from helmr import local

        projector = self._projector(url)
        control_ready = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:

            def launch(part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
                return tasks.create_task(part)

            parts = [launch(self._control(nc, control_ready))]
            if embedded is not None:
                parts.append(launch(embedded.supervise()))
            try:
                await first_of(control_ready, self._stop.asked)
                if not self._stop.asked.is_set():
                    parts.append(launch(projector.run()))
                    await self._first_try(projector)
                    local.announce(self.home, url)
                    self._say_ready(url)
                await first_of(self._stop.asked, self._lost)
            finally:
                local.withdraw(self.home)
                await asyncio.shield(projector.stop(_PROJECTOR_GRACE))
                for part in parts:
                    part.cancel()

    async def _control(self, nc: Nats, ready: asyncio.Event) -> None:
        from bus.control import Control
        from bus.trace_export import TraceExport

        control = Control(nc, **self._control_options)
        try:
            async with asyncio.TaskGroup() as tasks, AsyncExitStack() as beside:
                await control.start(tasks)
                if self._traces is not None:
                    tasks.create_task(TraceExport(control.log, self._traces).run())
                if self._metrics is not None:
                    self._metrics_url = await beside.enter_async_context(_metrics_of(control, self._metrics))
                if self._http is not None:
                    self._http_url = await beside.enter_async_context(_gateway_of(control, self._http))
                ready.set()
                await asyncio.Event().wait()
        finally:
            control.close()

    def _projector(self, url: str) -> Part:
        command = [sys.executable, "-m", "store.main", "--url", url, "--home", str(self.home / "history")]
        command += self._history
        if self._verbose:
            command.append("--verbose")
        env = dict(os.environ)
        if self.token:
            env["HELMR_API_KEY"] = self.token

        def listen(line: str) -> bool:
            if line.startswith(_PROJECTOR_READY):
                return True
            if line:
                note(f"projector: {line}")
            return False

        # Its files survive any death, and an orphan that takes its time would keep the next one from them.
        return Part("projector", lambda: command, listen, orphaned=signal.SIGKILL, env=env)

    async def _first_try(self, projector: Part) -> None:
        """Wait for the projector, but not for ever: runs do not need it."""
        try:
            async with asyncio.timeout(_PROJECTOR_PATIENCE):
                await first_of(projector.tried, self._stop.asked)
        except TimeoutError:
            log.warning("the projector is not ready yet; lists and queries have to wait")

    def _say_ready(self, url: str) -> None:
        if self.json:
            json_line(
                Ready(url=url, pid=os.getpid(), home=str(self.home), metrics=self._metrics_url, http=self._http_url)
            )
            return
        note(f"Helmr server at {url} (home {self.home}); Ctrl-C stops it")
        if self._metrics_url:
            note(f"metrics at {self._metrics_url}")
        if self._http_url:
            note(f"tokens and streams over HTTP at {self._http_url}")


@asynccontextmanager
async def _metrics_of(control: Control, address: Address) -> AsyncIterator[str]:
    from bus.exposition import serving
    from bus.metrics import ServerMetrics

    metrics = ServerMetrics(control.nc, control.live, control.presence, control.tally)
    await metrics.start()
    async with serving(address, metrics.read) as url:
        yield url


@asynccontextmanager
async def _gateway_of(control: Control, address: Address) -> AsyncIterator[str]:
    from bus.gateway import serving

    async with serving(address, control.log, control.streams) as url:
        yield url


def _use_scratch(folder: Path) -> None:
    """Keep temporary files in a folder of our own, where the next server removes what a killed one has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tempfile.tempdir = str(folder)


def _refuse_second(home: Path) -> None:
    """A home folder is for one server at a time: it holds one history and one connection file.

    Raises:
        Conflict: a server has announced itself here, whatever NATS it stands on.
    """
    from helmr import local

    try:
        url = local.find(home)
    except Unavailable:
        return
    raise Conflict(f"a Helmr server at {url} runs already in {home}", hint="set HELMR_HOME to another folder")
