"""Deployments and the pointer to the current one, in the ``config`` bucket, with a cache that follows it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from difflib import get_close_matches
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.kv import KeyValue

from bus import topology
from bus.bucket import BucketView
from helmr import events, ids
from helmr.errors import NotFound, Unavailable
from helmr.models import Deployment
from helmr.reducers import queue as queue_rules
from helmr.reducers.queue import Limits
from helmr.subjects import Scope


class Deployments:
    """Creates, finds and promotes deployments; run :meth:`watch` in a task of its own."""

    def __init__(self, nc: Nats, *, on_current: Callable[[Scope, Deployment], None] = lambda *_: None) -> None:
        """``on_current`` is told, while :meth:`watch` runs, which deployment is an environment's current one."""
        self.nc = nc
        self._on_current = on_current
        self._view = BucketView(nc, topology.CONFIG_BUCKET, self._on_value)
        self.ready = self._view.ready
        self._by_id: dict[str, Deployment] = {}
        self._current: dict[Scope, str] = {}

    def get(self, scope: Scope, reference: str) -> Deployment:
        """A deployment by id or version.

        Raises:
            NotFound: with close matches as hint.
        """
        for deployment in self.list(scope):
            if reference in {deployment.id, deployment.version}:
                return deployment
        versions = [deployment.version for deployment in self.list(scope)]
        close = get_close_matches(reference, versions, n=1)
        hint = f"did you mean {close[0]}?" if close else "list them with `helmr deployment list`"
        raise NotFound(f"no deployment {reference} in {scope}", hint=hint)

    async def load(self, scope: Scope, deployment_id: str) -> Deployment:
        """A deployment by id, read from the bucket if the cache does not have it yet."""
        cached = self._by_id.get(deployment_id)
        if cached is not None:
            return cached
        try:
            entry = await (await self._bucket()).get(_key(scope, deployment_id))
        except nats.js.errors.KeyNotFoundError as error:
            raise NotFound(f"no deployment {deployment_id} in {scope}") from error
        except (TimeoutError, nats.errors.Error) as error:
            raise Unavailable(f"the config bucket does not answer: {error}") from error
        return self._remember(entry.value or b"")

    def current(self, scope: Scope) -> Deployment:
        """The current deployment of an environment.

        Raises:
            NotFound: nothing has been deployed there.
        """
        current = self._current.get(scope)
        if current is None or current not in self._by_id:
            raise NotFound(f"nothing is deployed in {scope}", hint="deploy a task project first: helmr deploy DIR")
        return msgspec.structs.replace(self._by_id[current], current=True)

    def limits(self, scope: Scope, queue: str, deployment_id: str | None) -> Limits:
        """The limits of a queue, as the current deployment declares it, else as ``deployment_id`` does."""
        found = self.queue(scope, queue) or self._queue(deployment_id, queue) or {}
        return queue_rules.limits(found.get("concurrency"), found.get("concurrency_per_key"))

    def queue(self, scope: Scope, name: str) -> dict[str, Any] | None:
        """A queue as the current deployment declares it, if it does."""
        return self._queue(self._current.get(scope), name)

    def _queue(self, deployment_id: str | None, name: str) -> dict[str, Any] | None:
        known = self._by_id.get(deployment_id or "")
        declared: list[dict[str, Any]] = known.index.get("queues", []) if known else []
        return next((entry for entry in declared if entry["name"] == name), None)

    def queues(self) -> list[tuple[Scope, str]]:
        """The queues that the current deployments of all environments declare."""
        current = [(scope, self._by_id[each]) for scope, each in self._current.items() if each in self._by_id]
        return [(scope, entry["name"]) for scope, each in current for entry in each.index.get("queues", ())]

    def list(self, scope: Scope) -> list[Deployment]:
        """The deployments of an environment, newest first."""
        current = self._current.get(scope)
        found = [d for d in self._by_id.values() if (d.project, d.environment) == tuple(scope)]
        found.sort(key=lambda d: d.created_at, reverse=True)
        return [msgspec.structs.replace(d, current=d.id == current) for d in found]

    async def create(
        self,
        scope: Scope,
        *,
        content_hash: str,
        archive: str,
        archive_bytes: int,
        index: dict[str, Any],
        promote: bool,
    ) -> Deployment:
        """Record a new, immutable deployment; its archive must be stored already."""
        bucket = await self._bucket()
        at = events.now()
        version = await self._claim_version(bucket, scope, at)
        deployment = Deployment(
            id=ids.new("dep"),
            version=version,
            project=scope.project,
            environment=scope.environment,
            content_hash=content_hash,
            archive=archive,
            archive_bytes=archive_bytes,
            created_at=at,
            index=index,
        )
        await bucket.put(_key(scope, deployment.id), msgspec.json.encode(deployment))
        self._by_id[deployment.id] = deployment
        return await self.promote(scope, deployment.id) if promote else deployment

    async def promote(self, scope: Scope, reference: str) -> Deployment:
        """Make a deployment the current one; promoting an older one is a rollback."""
        deployment = self.get(scope, reference)
        await (await self._bucket()).put(f"current.{scope}", deployment.id.encode())
        self._current[scope] = deployment.id
        return self.current(scope)

    async def watch(self) -> None:
        """Follow the bucket for ever."""
        await self._view.watch()

    def _on_value(self, key: str, value: bytes | None) -> None:
        if value is None:
            return
        if key.startswith("deployment."):
            self._remember(value)
        elif key.startswith("current."):
            _, project, environment = key.split(".")
            self._current[Scope(project, environment)] = current = value.decode()
            if current in self._by_id:
                self._on_current(Scope(project, environment), self._by_id[current])

    def _remember(self, data: bytes) -> Deployment:
        deployment = msgspec.json.decode(data, type=Deployment)
        self._by_id[deployment.id] = deployment
        return deployment

    async def _claim_version(self, bucket: KeyValue, scope: Scope, at: datetime) -> str:
        """The next free ``YYYYMMDD.N``; creating its key is what claims it."""
        day = at.strftime("%Y%m%d")
        number = sum(d.version.startswith(f"{day}.") for d in self.list(scope)) + 1
        while True:
            try:
                await bucket.create(f"version.{scope}.{day}-{number}", b"1")
            except nats.js.errors.KeyWrongLastSequenceError:
                number += 1
            else:
                return f"{day}.{number}"

    async def _bucket(self) -> KeyValue:
        return await self.nc.jetstream().key_value(topology.CONFIG_BUCKET)


def _key(scope: Scope, deployment_id: str) -> str:
    return f"deployment.{scope}.{deployment_id}"
