"""Kills the projector with SIGKILL while it works, and compares the history with the log in the end.

    .venv/bin/python -m bench.kills --kills 200 --seed 6

The server is a process of its own; messages come in meanwhile, of days that are over, so that each start archives. A kill
counts if the projector had applied something since the one before. It ends with 1 if a row is missing, or there twice. Moments
are the same for a seed, as far as the machine lets them be.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from bus.server import EmbeddedServer
from bus.setup import ensure_topology
from helmr.connection import connected
from store.verify import Verified, verify
from tests.integration.history import HistoryProcess
from tests.kills import Toll, kill_again_and_again


async def run(kills: int, seed: int, rate: int) -> Verified:
    """Kill, let it catch up, stop it in good order and compare."""
    began = time.monotonic()

    def tell(toll: Toll) -> None:
        if toll.kills % 20 == 0:
            print(
                f"{toll.kills} kills after {time.monotonic() - began:.0f} s, {toll.archiving} while archiving",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder), durability="relaxed")
        await server.start()
        home = Path(folder) / "history"
        async with connected(server.url, name="kills") as nc, HistoryProcess(server.url, home) as process:
            await ensure_topology(nc)
            toll = await kill_again_and_again(process, nc, kills, seed, rate=rate, tell=tell)
            print(
                f"{toll.kills} kills, {toll.idle} more without progress, {toll.archiving} left a file half-written",
                flush=True,
            )
            await process.start()
            await process.caught_up(nc, patience=600)
            await process.stop()
            found = await verify(server.url, home)
        await server.stop()
    return found


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--rate", type=int, default=1000, help="messages a second")
    options = parser.parse_args()
    found = asyncio.run(run(options.kills, options.seed, options.rate))
    for name, table in found.tables.items():
        print(f"{name}: {table.rows} rows, {table.missing} missing, {table.extra} extra")
    return 0 if found.same else 1


if __name__ == "__main__":
    sys.exit(main())
