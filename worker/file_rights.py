"""Whether this process may read, write and give away files whoever they belong to: what versions of containers' files need.

Root may, unless its capabilities were taken away; others may when they were given some: systemd's ``AmbientCapabilities``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

#: Bits of the effective set (linux/capability.h): to read all files, and to make copies that belong to the tasks' user.
NEEDED = {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3}
_STATUS = Path("/proc/self/status")


def missing() -> list[str]:
    """The capabilities that this process lacks, by name; where the kernel knows none, root lacks nothing."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    if found is None:
        return [] if os.geteuid() == 0 else [*NEEDED]
    effective = int(found[1], 16)
    return [name for name, bit in NEEDED.items() if not effective >> bit & 1]
