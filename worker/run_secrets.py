"""The secrets of one run on its worker: asked of control under the lease, given to the process, kept out of what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.services.secrets import ReleaseReply, ReleaseRequest
from helmr import errors, subjects
from helmr.errors import Conflict, HelmrError, Unavailable
from helmr.subjects import Scope
from worker.engine import SecretFile
from worker.masking import Masker

_TIMEOUT = 5.0
#: Seconds between requests while control is away; the run's own deadline ends them.
_RETRY_DELAY = 0.5


class RunSecrets(msgspec.Struct, frozen=True):
    """What a process is given, and the masker for what it says."""

    env: dict[str, str] = {}
    files: tuple[SecretFile, ...] = ()
    masker: Masker = Masker()

    def __repr__(self) -> str:
        return f"RunSecrets({sorted(self.env)}, {self.files})"


NONE = RunSecrets()


class SecretMissing(HelmrError):
    """A secret that the run declares cannot be had (any more)."""


async def fetch(nc: Nats, scope: Scope, request: ReleaseRequest) -> dict[str, str]:
    """The values by name of the secrets that a run declares which is leased to us; waits while control is away.

    Raises:
        SecretMissing: one is gone, or cannot be decrypted.
        Conflict: the lease is lost.
    """
    subject, body = subjects.api(scope, "secret", "release"), msgspec.json.encode(request)
    while True:
        try:
            reply = _decode(await nc.request(subject, body, timeout=_TIMEOUT))
        except (TimeoutError, nats.errors.Error, OSError, Unavailable):
            await asyncio.sleep(_RETRY_DELAY)  # nothing tells us that control is back
        else:
            return reply.values


def _decode(msg: Msg) -> ReleaseReply:
    if msg.headers and "Nats-Service-Error" in msg.headers:
        error = errors.from_dict(msgspec.json.decode(msg.data)["error"])
        if isinstance(error, Conflict | Unavailable):
            raise error
        raise SecretMissing(error.message, hint=error.hint, details=error.details)
    return msgspec.json.decode(msg.data, type=ReleaseReply)


def place(declared: Any, values: dict[str, str]) -> RunSecrets:
    """Which value goes where."""
    env = {each["env"]: values[each["name"]] for each in declared if each.get("env")}
    files = tuple(
        SecretFile(path=each["file"], mode=each.get("mode", 0o400), value=values[each["name"]])
        for each in declared
        if each.get("file")
    )
    return RunSecrets(env, files, Masker(values.values()))
