"""Streams and buckets come into being once, and an older version's settings are brought up to date."""

from __future__ import annotations

import pytest
from nats.aio.client import Client as Nats
from nats.js.api import KeyValueConfig, StreamConfig

from bus import topology
from bus.requests import api
from bus.setup import ensure_topology
from helmr import subjects

pytestmark = pytest.mark.anyio


async def _config(nc: Nats, stream: str) -> dict[str, object]:
    config: dict[str, object] = (await api(nc, f"STREAM.INFO.{stream}", None))["config"]
    return config


async def test_setting_up_twice_changes_nothing(nc: Nats) -> None:
    await ensure_topology(nc)
    before = [await _config(nc, name) for name in (topology.RUNS, topology.LOGS, topology.SESSIONS, topology.CONFIG)]
    await ensure_topology(nc)
    assert before == [
        await _config(nc, name) for name in (topology.RUNS, topology.LOGS, topology.SESSIONS, topology.CONFIG)
    ]


async def test_an_older_versions_settings_are_updated(nc: Nats) -> None:
    js = nc.jetstream()
    await js.create_key_value(KeyValueConfig(bucket=topology.PRESENCE_BUCKET, ttl=77))
    await js.add_stream(StreamConfig(name=topology.SESSIONS, subjects=[subjects.ALL_IO], allow_direct=False))
    await ensure_topology(nc)
    presence = await _config(nc, f"KV_{topology.PRESENCE_BUCKET}")
    assert presence["max_age"] == pytest.approx(topology.PRESENCE_TTL * 1e9)
    assert (await _config(nc, topology.SESSIONS))["allow_direct"] is True
