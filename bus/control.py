"""Control: the services clients call, and the reactors that turn facts into next facts.

It keeps nothing of its own: several may run side by side, and one may die at any point.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
from nats.aio.client import Client as Nats

from bus import topology
from bus.admission import Admission
from bus.artifacts import open_artifacts
from bus.continuations import Continuations
from bus.deployments import Deployments
from bus.explainer import Explainer
from bus.half_starts import HalfStarts
from bus.insistence import insist
from bus.janitor import RETENTION, Janitor
from bus.keyring import KeyRing
from bus.live import LiveRuns
from bus.live_follower import LiveFollower
from bus.log import Log
from bus.presence import Presence, WorkerInfo
from bus.reactors import Reactors
from bus.requests import api
from bus.rescue import Rescue
from bus.s3_place import Place
from bus.services.access import AccessTokens
from bus.services.deployments import DeploymentService, NoArguments
from bus.services.endpoint import Endpoint, Tally, serve
from bus.services.execs import Execs
from bus.services.live import Live
from bus.services.queues import Queues
from bus.services.runs import Runs
from bus.services.secrets import Secrets
from bus.services.sessions import Sessions
from bus.services.streams import Streams
from bus.services.tokens import Tokens
from bus.services.versions import WorkspaceVersions
from bus.services.workspaces import Workspaces
from bus.setup import ensure_topology
from bus.starts import Planner
from bus.values import Values
from bus.vault import Vault
from bus.versions import Versions
from helmr.connection import server_version
from helmr.subjects import Scope
from helmr.version import __version__


class StatusReply(msgspec.Struct, kw_only=True):
    """Control's view of the installation."""

    version: str
    nats_version: str
    streams: dict[str, dict[str, int]]
    workers: list[WorkerInfo]
    current: str | None
    runs: dict[str, int]  #: live runs of the project and environment: ``held``, ``queued``, ``running``, ``waiting``


class Control:
    """One control process; use as ``async with asyncio.TaskGroup() as tasks: await control.start(tasks)``."""

    def __init__(self, nc: Nats, ring: KeyRing, *, retention: float = RETENTION, artifacts: Place = None) -> None:
        self.nc = nc
        self.log = Log(nc)
        self.tally = Tally()
        self.presence = Presence(nc)
        self.live = LiveRuns()
        self.live_follower = LiveFollower(nc, self.live)
        self.deployments = Deployments(nc)
        self.admission = Admission(self.log, self.live, self.live_follower.ready, self.deployments, self.presence)
        versions = open_artifacts(nc, topology.VERSIONS, artifacts)
        values = Values(versions)
        explainer = Explainer(self.log, self.admission, self.presence)
        self.runs = Runs(self.log, self.presence, explainer, values)
        vault = Vault(nc, ring)
        planner = Planner(self.log, self.deployments, self.presence, self.admission.gate, vault, values=values)
        self.secrets = Secrets(self.log, vault)
        continuations = Continuations(self.log, self.deployments, self.presence, self.admission.gate)
        self.sessions = Sessions(
            self.log, planner, self.runs.cancel_quietly, self.admission.lanes.forget, continuations.check
        )
        self.streams = Streams(self.log, self.deployments)
        self.live_service = Live(self.live, self.live_follower.ready)
        self.queues = Queues(self.log, self.deployments, self.admission)
        self.tokens = Tokens(self.log)
        self.access = AccessTokens(self.log, self.streams)
        self.workspaces = Workspaces(self.log, self.presence, self.deployments)
        self.execs = Execs(self.log, self.presence)
        self.versions = WorkspaceVersions(self.log, self.workspaces, Versions(versions))
        self.uploads = DeploymentService(self.deployments, open_artifacts(nc, topology.ARTIFACTS, artifacts))
        self.reactors = Reactors(self.log, self.presence, self.admission.gate, continuations, self.sessions)
        self.rescue = Rescue(self.log, self.presence, self.live)
        self.half_starts = HalfStarts(self.log, self.live, self.sessions)
        self.janitor = Janitor(self.log, retention=retention)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Set up the streams, catch up with the buckets, start the reactors, and answer."""
        await insist(partial(ensure_topology, self.nc))
        tasks.create_task(self.presence.watch())
        tasks.create_task(self.live_follower.run())
        tasks.create_task(self.deployments.watch())
        await asyncio.gather(self.presence.ready.wait(), self.deployments.ready.wait())
        tasks.create_task(self.admission.run())
        tasks.create_task(self.rescue.run(self.live_follower.ready))
        tasks.create_task(self.half_starts.run(self.live_follower.ready))
        tasks.create_task(self.janitor.run())
        await self.reactors.start(tasks)
        await serve(self.nc, "helmr-control", __version__, self._endpoints(), tasks, tally=self.tally)

    def close(self) -> None:
        """Remove scratch files."""
        self.uploads.close()

    def _endpoints(self) -> list[Endpoint]:
        services: list[Any] = [
            self.sessions,
            self.streams,
            self.tokens,
            self.access,
            self.runs,
            self.workspaces,
            self.execs,
            self.versions,
            self.queues,
            self.live_service,
            self.secrets,
            self.uploads,
        ]
        own = [Endpoint("status", "get", NoArguments, self.status)]
        return own + [endpoint for service in services for endpoint in service.endpoints()]

    async def status(self, scope: Scope, _request: NoArguments) -> StatusReply:
        """Who is there, and how far the streams are."""
        names = (topology.RUNS, topology.SESSIONS, topology.LOGS)
        infos = await asyncio.gather(*(api(self.nc, f"STREAM.INFO.{name}", None) for name in names))
        streams = {
            name: {key: info["state"][key] for key in ("messages", "bytes", "last_seq")}
            for name, info in zip(names, infos, strict=True)
        }
        current = [d.version for d in self.deployments.list(scope) if d.current]
        return StatusReply(
            version=__version__,
            nats_version=server_version(self.nc),
            streams=streams,
            workers=sorted(self.presence.alive().values(), key=lambda w: w.id),
            current=current[0] if current else None,
            runs=self.live.count(scope),
        )
