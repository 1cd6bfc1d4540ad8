"""Whether a run may use a workspace that exists already: checked before anything of the run is created.

A workspace keeps its walls until it is given another sandbox: its machine may be live, with processes in it, when the run
arrives. So the sandbox of the task must be the same in everything that makes up the walls.
"""

from __future__ import annotations

from typing import Any

from helmr.errors import Conflict
from helmr.events import WorkspaceState

_HINT = "give it that sandbox with `helmr workspace update ID --task TASK`, or leave out --workspace for a new one"


def differences(made: dict[str, Any], needed: dict[str, Any]) -> list[str]:
    """What tells two sandboxes of an index apart, as far as a workspace is concerned; each in words."""
    rows = (
        ("sandbox", made["name"], needed["name"]),
        ("mount path", made["mount_path"], needed["mount_path"]),
        ("cpu", f"{made['cpu']:g}", f"{needed['cpu']:g}"),
        ("memory", _size(made["memory"]), _size(needed["memory"])),
        ("disk", _size(made["disk"]), _size(needed["disk"])),
        ("network", _network(made["network"]), _network(needed["network"])),
    )
    return [f"{what} {have} (the task needs {want})" for what, have, want in rows if have != want]


def check(state: WorkspaceState, task_id: str, made: dict[str, Any], needed: dict[str, Any]) -> None:
    """Refuse a workspace, made from the sandbox ``made``, for a task that needs the sandbox ``needed``.

    Raises:
        Conflict: it is deleted, or does not fit; the message names each difference, ``details["differences"]`` too.
    """
    if state.status == "deleted":
        raise Conflict(f"workspace {state.id} is deleted", hint="leave out --workspace for a new one")
    found = differences(made, needed)
    if found:
        raise Conflict(
            f"workspace {state.id} does not fit task {task_id}: it has {'; '.join(found)}",
            hint=_HINT,
            details={"differences": found},
        )


def _size(value: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value} bytes"


def _network(policy: Any) -> str:
    return policy if isinstance(policy, str) else f"[{', '.join(sorted(policy))}]"
