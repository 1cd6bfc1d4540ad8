"""The checks of ``helmr doctor``: each finds out one thing about this machine, and knows how to put it right."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cli.output import size
from helmr.durations import format_seconds
from helmr.errors import ConfigError, HelmrError, Unavailable

if TYPE_CHECKING:
    from helmr.client.aio import AsyncClient
    from worker.docker_api import DockerApi

_PYTHON = (3, 11)
#: Free bytes below which a home folder will soon be full, and below which a worker takes nothing new (worker/host.py).
_LITTLE_SPACE, _NO_SPACE = 2 * 1024**3, 512 * 1024**2
#: Seconds by which clocks may differ before timers are noticeably early or late.
_SKEW = 2.0
#: Seconds the projector may be behind before lists and queries show the past.
_LAG = 10.0
_DOCKER_PATIENCE = 10.0


class Finding(msgspec.Struct, kw_only=True):
    """What a check found; ``fix`` says what to do about a warning or a failure."""

    check: str
    state: Literal["ok", "warning", "failed"]
    detail: str
    fix: str | None = None


def _failed(check: str, error: HelmrError) -> Finding:
    return Finding(check=check, state="failed", detail=error.message, fix=error.hint)


async def machine(home: Path) -> AsyncIterator[Finding]:
    """Checks that need no server: Python, the home folder, the nats-server binary."""
    yield python()
    yield home_folder(home)
    yield await asyncio.to_thread(nats_binary)


def python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info < _PYTHON:
        return Finding(check="python", state="failed", detail=version, fix="install Python 3.11 or newer")
    return Finding(check="python", state="ok", detail=f"{version} at {sys.executable}")


def home_folder(home: Path) -> Finding:
    """Whether the home folder can be written to, and has room."""
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        fix = "set HELMR_HOME to a folder that you can write to"
        return Finding(check="home", state="failed", detail=f"{place} cannot be written to", fix=fix)
    free = shutil.disk_usage(place).free
    detail = f"{home}, {size(free)} free"
    if free < _LITTLE_SPACE:
        fix = "make room there, or set HELMR_HOME to a folder on another disk"
        return Finding(check="home", state="failed" if free < _NO_SPACE else "warning", detail=detail, fix=fix)
    return Finding(check="home", state="ok", detail=detail)


def nats_binary() -> Finding:
    """The nats-server that the embedded server would run."""
    from bus.server import binary_version, find_binary

    try:
        path = find_binary()
        version = ".".join(map(str, binary_version(path)))
    except ConfigError as error:
        return _failed("nats-server", error)
    return Finding(check="nats-server", state="ok", detail=f"{version} at {path}")


async def server(client: AsyncClient) -> AsyncIterator[Finding]:
    """Checks of a server that answers: control, workers, the projector's lag, the clock."""
    from cli.status import parts_of

    parts = await parts_of(client)
    fix = "start it with `helmr dev`, or `helmr server` and `helmr worker`; its stderr says why it ended"
    for name, part in parts.items():
        state: Literal["ok", "failed"] = "ok" if part.up else "failed"
        yield Finding(check=name, state=state, detail=part.detail, fix=None if part.up else fix)
    yield _lag(parts["projector"].facts.get("lag_seconds", 0.0))
    yield await _clock(client)


def _lag(seconds: float) -> Finding:
    detail = f"{format_seconds(seconds)} behind"
    if seconds > _LAG:
        fix = "wait for it to catch up; if it does not, see its messages on the server's stderr"
        return Finding(check="projector lag", state="warning", detail=detail, fix=fix)
    return Finding(check="projector lag", state="ok", detail=detail)


async def _clock(client: AsyncClient) -> Finding:
    from bus import topology
    from bus.requests import api

    try:
        answer = await api(client.wire.nc, f"STREAM.INFO.{topology.RUNS}", None)
        skew = (datetime.now(UTC) - datetime.fromisoformat(answer["ts"])).total_seconds()
    except (Unavailable, KeyError, ValueError) as error:
        return Finding(check="clock", state="warning", detail=f"not compared: {error}", fix="see `helmr status`")
    detail = f"{abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} the NATS server's"
    if abs(skew) > _SKEW:
        return Finding(check="clock", state="failed", detail=detail, fix="synchronise both clocks, e.g. with chrony")
    return Finding(check="clock", state="ok", detail=detail)


async def engine(home: Path, client: AsyncClient | None) -> AsyncIterator[Finding]:
    """Checks of the Docker engine: does it answer, has it room, and what is left on it that nobody needs."""
    from worker.docker_api import DockerApi

    api = DockerApi()
    try:
        facts: dict[str, Any] = await api.call(lambda docker: docker.info(), patience=_DOCKER_PATIENCE)
        cgroup = facts.get("CgroupVersion", "1")
        yield Finding(
            check="docker", state="ok", detail=f"{facts['ServerVersion']}, cgroup v{cgroup}, {facts['Driver']}"
        )
        yield walls(facts)
        yield _versions()
        yield _engine_disk(Path(facts["DockerRootDir"]))
        yield await _containers(api, home, client)
        yield await _volumes(api, home, client)
    except HelmrError as error:
        yield _failed("docker", error)
    finally:
        await api.close()


#: What limits of containers need of the kernel, by the fact that says whether the engine can set them.
_LIMITS = {"MemoryLimit": "memory", "SwapLimit": "swap", "PidsLimit": "processes", "CpuCfsQuota": "processors"}


def walls(facts: dict[str, Any]) -> Finding:
    """What stands between a task and this machine, as the engine describes itself; ``docs/explanation/isolation.md``."""
    options = {part.removeprefix("name=") for each in facts.get("SecurityOptions") or () for part in each.split(",")}
    standing = ["namespaces", "network by the worker's proxy alone"]
    standing += [name for name in ("seccomp", "apparmor", "selinux", "userns", "rootless") if name in options]
    missing = [what for fact, what in _LIMITS.items() if not facts.get(fact, True)]
    limits = [what for what in _LIMITS.values() if what not in missing]
    standing.append(f"limits of {', '.join(limits)}" if limits else "no limits")
    standing.append("the disk of workspaces looked at")
    detail = "; ".join(standing)
    if "seccomp" not in options:
        fix = "use an engine and a kernel with seccomp: without it a task may make any system call"
        return Finding(check="walls", state="failed", detail=f"{detail}; NO seccomp", fix=fix)
    if missing:
        fix = "enable the cgroup controllers for it (a rootless engine needs cgroup v2 and systemd's delegation)"
        return Finding(check="walls", state="warning", detail=f"{detail}; NOT of {', '.join(missing)}", fix=fix)
    return Finding(check="walls", state="ok", detail=detail)


def _versions() -> Finding:
    """Whether a worker of this user can store what containers leave in workspaces."""
    from worker import file_rights

    lacking = file_rights.missing()
    if lacking:
        detail = f"a worker of this user makes none of files in containers: it lacks {', '.join(lacking)}"
        fix = "run it as root, or give it these capabilities: see docs/how-to/server-and-workers.md"
        return Finding(check="versions", state="warning", detail=detail, fix=fix)
    return Finding(check="versions", state="ok", detail="a worker of this user may read what containers write")


def _engine_disk(root: Path) -> Finding:
    if not root.exists():
        return Finding(check="docker disk", state="ok", detail="not on this machine")
    free = shutil.disk_usage(root).free
    detail = f"{root}, {size(free)} free"
    if free < _LITTLE_SPACE:
        return Finding(check="docker disk", state="warning", detail=detail, fix="make room: docker system prune")
    return Finding(check="docker disk", state="ok", detail=detail)


def _labels(home: Path) -> list[str] | None:
    """The labels of what this home has on the engine; None if it never had a worker."""
    from worker.container_spec import INSTALL

    try:
        return [f"{INSTALL}={(home / 'host-id').read_text().strip()}"]
    except OSError:
        return None


async def _containers(api: DockerApi, home: Path, client: AsyncClient | None) -> Finding:
    """Containers of this home whose worker is gone."""
    from worker.container_spec import WORKER

    labels = _labels(home)
    if labels is None:
        return Finding(check="containers", state="ok", detail="none: no worker has run in this home yet")
    found = await api.call(lambda docker: docker.containers(all=True, filters={"label": labels}))
    control = (await client.status())["control"] if client else None
    alive = {worker["id"] for worker in control["workers"]} if control else set()
    left = [item["Id"][:12] for item in found if item["Labels"].get(WORKER) not in alive]
    if left:
        fix = f"the next worker of this home removes them; or: docker rm -f {' '.join(left)}"
        return Finding(check="containers", state="failed", detail=f"{len(left)} left by workers that are gone", fix=fix)
    return Finding(check="containers", state="ok", detail=f"{len(found)}, each of a worker that is alive")


async def _volumes(api: DockerApi, home: Path, client: AsyncClient | None) -> Finding:
    """Volumes of this home whose workspace is unknown or deleted."""
    from worker.container_spec import WORKSPACE

    labels = _labels(home)
    if labels is None or client is None:
        return Finding(check="volumes", state="ok", detail="not compared: no server answers" if labels else "none")
    found = (await api.call(lambda docker: docker.volumes(filters={"label": labels})))["Volumes"] or []
    known = await _workspaces(client)
    left = [volume["Name"] for volume in found if volume["Labels"].get(WORKSPACE) not in known]
    if left:
        fix = f"docker volume rm {' '.join(left)}"
        return Finding(check="volumes", state="failed", detail=f"{len(left)} of workspaces that do not exist", fix=fix)
    return Finding(check="volumes", state="ok", detail=f"{len(found)}, each of a workspace that exists")


async def _workspaces(client: AsyncClient) -> set[str]:
    """The ids of all workspaces of the installation, whatever their project."""
    from bus import topology
    from bus.requests import api
    from helmr import subjects

    ids: dict[str, set[str]] = {}
    for kind in ("created", "deleted"):
        body = {"subjects_filter": subjects.of_kind("workspace", kind)}
        answer = await api(client.wire.nc, f"STREAM.INFO.{topology.RUNS}", body)
        listed = answer.get("state", {}).get("subjects") or {}
        ids[kind] = {subjects.parse_event(subject).id for subject in listed}
    return ids["created"] - ids["deleted"]
