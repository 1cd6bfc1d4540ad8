"""What the engine is told about a machine's container: the one place where its isolation is decided.

Every right that is not listed here is absent. ``tests/docker/test_isolation.py`` tries to break out of what this makes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from docker import APIClient
from docker.types import LogConfig, Mount, Ulimit

from worker.base_tree import TASK_UID
from worker.engine import MachineSpec
from worker.seccomp import profile

INSTALL, WORKER, WORKSPACE, KIND = "helmr.install", "helmr.worker", "helmr.workspace", "helmr.kind"
CLAIM = "helmr.claim"

#: What the supervisor needs to become root's opposite: drop to the tasks' user, signal its processes, own their files.
_CAPABILITIES = ["SETUID", "SETGID", "KILL", "CHOWN"]
#: Seconds without any worker after which a supervisor ends its processes and itself.
ORPHAN_TIMEOUT = 60
#: Bytes of ``/tmp``, at most; it counts as memory of the container, so a smaller container gets less.
_TMP_SIZE = 1024**3
#: Open files of each process: enough for a supervisor of hundreds, and below what engines that may not raise limits have.
_NOFILE = 16384


class HostSide(msgspec.Struct, frozen=True, kw_only=True):
    """What the host contributes: folders to mount, names, and how many processors it has."""

    install: str
    name: str
    library: Path
    run: Path
    sources: Path
    files: Path
    cpus: int


def container(client: APIClient, spec: MachineSpec, host: HostSide) -> dict[str, Any]:
    """The arguments of the SDK's ``create_container``."""
    labels = {INSTALL: host.install, WORKSPACE: spec.workspace_id}
    mounts = [
        Mount(spec.mount_path, str(host.files), type="bind"),
        Mount("/helmr/lib/helmr", str(host.library), type="bind", read_only=True),
        Mount("/helmr/sources", str(host.sources), type="bind", read_only=True),
        Mount("/helmr/run", str(host.run), type="bind"),
    ]
    return {
        "image": spec.image,
        "name": host.name,
        "entrypoint": _supervisor(spec),
        "user": "0:0",
        "working_dir": "/",
        "labels": {**spec.labels, **labels, WORKER: spec.worker_id, CLAIM: str(spec.claim), KIND: "machine"},
        "healthcheck": {"test": ["NONE"]},
        "detach": True,  # with an attached container the engine would close its standard input for ever
        "host_config": client.create_host_config(mounts=mounts, **_limits(spec, host.cpus), **_confinement()),
    }


def task_owner() -> int:
    """The user and group id of tasks: never the worker's own, to whom the supervisor's socket belongs."""
    return TASK_UID if os.getuid() != TASK_UID else TASK_UID + 1


def _supervisor(spec: MachineSpec) -> list[str]:
    options = {
        "socket": "/helmr/run/socket",
        "workspace": spec.mount_path,
        "workspace-id": spec.workspace_id,
        "sources": "/helmr/sources",
        "uid": str(task_owner()),
        "gid": str(task_owner()),
        "home": "/tmp/home",  # noqa: S108 - in the container
        "orphan-timeout": str(ORPHAN_TIMEOUT),
    }
    if spec.network != "none":
        options["way-out"] = "/helmr/run/way-out"
    command = ["python3", "-I", "-S", "-B", "/helmr/lib/helmr/guest/boot.py"]
    return [*command, *(word for name, value in options.items() for word in (f"--{name}", value))]


def _limits(spec: MachineSpec, cpus: int) -> dict[str, Any]:
    limits = spec.limits
    tmp = min(_TMP_SIZE, limits.memory // 2)
    return {
        "nano_cpus": int(min(limits.cpu, cpus) * 1e9),
        "mem_limit": limits.memory,
        "memswap_limit": limits.memory,  # the sum of memory and swap: no swap
        "pids_limit": limits.pids,
        "shm_size": min(64 * 1024**2, tmp),
        "ulimits": [Ulimit(name="nofile", soft=_NOFILE, hard=_NOFILE), Ulimit(name="core", soft=0, hard=0)],
        "tmpfs": {
            "/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={tmp}",  # noqa: S108 - in the container
            "/run": "rw,nosuid,nodev,noexec,mode=755,size=16m",
        },
        # Nothing but a supervisor that cannot start writes here; its last words are the error message.
        "log_config": LogConfig(type="local", config={"max-size": "64k", "max-file": "1", "compress": "false"}),
    }


def _confinement() -> dict[str, Any]:
    return {
        "read_only": True,
        "cap_drop": ["ALL"],
        "cap_add": _CAPABILITIES,
        "security_opt": ["no-new-privileges:true", f"seccomp={profile()}"],
        # Whatever the policy: what may be reached is reached through the worker (worker/egress.py).
        "network_mode": "none",
        # The socket belongs to the worker's group when the worker is not root, and there is no DAC_OVERRIDE here.
        "group_add": [] if os.getuid() == 0 else [str(os.getgid())],
    }
