"""What the kernel counts for this container: how often it has killed a process for memory."""

from __future__ import annotations

import os

#: cgroup v2, then v1.
_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def oom_kills() -> int:
    """How often the kernel has killed in this container for memory; 0 outside one (a host's counter says nothing)."""
    if os.getpid() != 1:
        return 0
    for path in _COUNTERS:
        try:
            with open(path, "rb") as counters:
                for line in counters:
                    name, _, value = line.partition(b" ")
                    if name == b"oom_kill":
                        return int(value)
        except OSError:
            continue
    return 0
