"""Processor time of the parts of an installation, from the kernel's accounts: what a run costs, however busy the machine is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine that has a command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0]:
            yield int(folder.name), words


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def seconds(pid: int, *, whole_tree: bool) -> float:
    """Processor time of a process, and with ``whole_tree`` of all that it has started, the ended ones included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own = sum(map(int, fields[11 : 15 if whole_tree else 13])) / _TICKS
    return own + (sum(seconds(child, whole_tree=True) for child in children(pid)) if whole_tree else 0.0)


def began(pid: int) -> int:
    """When a process was started, in ticks since the machine was."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


class Account:
    """What each part has used so far; ``server`` and ``worker`` are processes, and machines those made since the worker began.

    Not by the names of workspaces: a machine from the pool was started before it had one.
    """

    def __init__(self, server: int, worker: int) -> None:
        self._roots = {"control": [server], "nats-server": [], "projector": [], "worker": [worker], "machines": []}
        for child in children(server):
            words = Path(f"/proc/{child}/cmdline").read_text()
            self._roots["projector" if "store.main" in words else "nats-server"].append(child)
        for pid, words_of in processes():
            if "--workspace-id" in words_of and began(pid) >= began(worker):
                self._roots["machines"].append(pid)

    def read(self) -> dict[str, float]:
        """Seconds of processor time by part."""
        used = {"client": time.process_time()}
        for name, roots in self._roots.items():
            used[name] = sum(seconds(pid, whole_tree=name == "machines") for pid in roots)
        return used

    @property
    def projector(self) -> int:
        """The projector's process."""
        return self._roots["projector"][0]
