"""Brings the streams and buckets of :mod:`bus.topology` into being, and keeps their configuration up to date."""

from __future__ import annotations

import logging
from typing import Any

import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.api import KeyValueConfig, ObjectStoreConfig, StreamConfig

from bus import topology
from bus.requests import api
from helmr.errors import Unavailable

log = logging.getLogger(__name__)

_EXISTS = 10058


async def ensure_topology(nc: Nats) -> None:
    """Create what is missing and update what differs; safe to call from several processes at once.

    Raises:
        Unavailable: JetStream refuses, e.g. because the disk is full.
    """
    for config, extra in topology.streams():
        await _ensure_stream(nc, config, extra)
    js = nc.jetstream()
    try:
        await js.create_key_value(KeyValueConfig(bucket=topology.CONFIG_BUCKET, history=1))
        await js.create_key_value(KeyValueConfig(bucket=topology.PRESENCE_BUCKET, ttl=topology.PRESENCE_TTL))
        await js.create_object_store(topology.ARTIFACTS, ObjectStoreConfig())
    except nats.js.errors.APIError as error:
        raise Unavailable(f"JetStream cannot create a bucket: {error.description}") from error


async def _ensure_stream(nc: Nats, config: StreamConfig, extra: dict[str, Any]) -> None:
    wanted = config.as_dict() | extra
    found = await api(nc, f"STREAM.INFO.{config.name}", None)
    if "error" in found:
        created = await api(nc, f"STREAM.CREATE.{config.name}", wanted)
        error = created.get("error")
        if error and error.get("err_code") != _EXISTS:
            raise Unavailable(f"JetStream cannot create stream {config.name}: {error['description']}")
        return
    if any(found["config"].get(key) != value for key, value in wanted.items() if value is not None):
        updated = await api(nc, f"STREAM.UPDATE.{config.name}", found["config"] | wanted)
        if "error" in updated:
            log.warning("stream %s keeps its settings: %s", config.name, updated["error"]["description"])
