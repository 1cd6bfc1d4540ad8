"""Starts the supervisor of a machine, and before that the zygote: both import at the same time, which is most of a boot.

Run as a script, by any Python >= 3.10, from wherever the folder ``helmr`` is mounted::

    python3 -I -S -B …/helmr/guest/boot.py --socket PATH --workspace DIR [--workspace-id ID] [--sources DIR]
        [--uid N --gid N] [--home DIR] [--orphan-timeout SECONDS] [--stop-grace SECONDS] [--runner MODULE:FUNCTION]
        [--secret-root DIR] [--way-out PATH]
"""

from __future__ import annotations

import os
import sys
import types


def main(arguments: list[str]) -> None:
    """Prepare, then be the supervisor."""
    from helmr.guest.fork_server import ForkServer
    from helmr.guest.options import Options, prepare

    options = Options(arguments)
    prepare(options)
    zygote = ForkServer(options)

    from helmr.guest.supervisor import Supervisor

    Supervisor(options, zygote).serve()


def _find_guest() -> None:
    """Make this folder importable. The package's own __init__ would import what tasks need, and cost tens of milliseconds."""
    guest = os.path.dirname(os.path.abspath(__file__))
    for name, path in (("helmr", os.path.dirname(guest)), ("helmr.guest", guest)):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]


if __name__ == "__main__":
    _find_guest()
    main(sys.argv[1:])
