"""What many runs leave behind: containers, volumes, networks, folders, blobs of versions; each run is executed once.

    .venv/bin/python -m bench.leftovers --runs 1000 --workspaces 50

Each run appends a byte to a file of its workspace, and so makes a version. The runs of a workspace follow each other, many
workspaces at a time; far more workspaces than a worker keeps idle containers, so that containers come and go. What is there is
counted after the last run, once more after all workspaces are deleted and the garbage is removed, and when the worker has
stopped. Volumes and networks are those of the whole engine: on one that others use, compare with what they do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import NamedTuple

from bench.installation import part, ready, server
from bench.start import output
from bus import topology
from bus.artifacts import open_artifacts
from bus.garbage import Garbage
from bus.versions import Versions
from helmr.client import AsyncClient
from worker.container_spec import INSTALL

#: Folders of a worker's home that hold one entry for each live machine, copy or workspace.
_FOLDERS = ("workspaces", "versions", "machines", "processes", "restoring")


class Left(NamedTuple):
    """What is there, by number."""

    containers: int
    volumes: int
    networks: int
    folders: dict[str, int]

    def __str__(self) -> str:
        folders = ", ".join(f"{name} {count}" for name, count in self.folders.items())
        return f"containers {self.containers}, volumes {self.volumes}, networks {self.networks}; folders: {folders}"


async def look(home: Path) -> Left:
    """Count what an installation has on the engine and on the disk."""
    install = (home / "host-id").read_text().strip()
    containers = await output("docker", "ps", "-aq", "--filter", f"label={INSTALL}={install}")
    volumes, networks = await output("docker", "volume", "ls", "-q"), await output("docker", "network", "ls", "-q")
    folders = {name: len([*(home / name).iterdir()]) for name in _FOLDERS if (home / name).exists()}
    return Left(len(containers.split()), len(volumes.split()), len(networks.split()), folders)


async def fill(client: AsyncClient, workspaces: list[str], runs: int, at_a_time: int) -> None:
    """Have the runs of all workspaces executed, and check that each was executed once."""
    window = asyncio.Semaphore(at_a_time)

    async def one(workspace: str) -> None:
        async with window:
            for number in range(1, runs + 1):
                started = await client.sessions.start("prints", {"lines": 2, "pause": 0}, workspace=workspace)
                run = await started.run.wait(timeout=600)
                if (run.status, run.output) != ("succeeded", number):
                    raise SystemExit(f"run {run.id}: {run.status}, output {run.output}, not {number}; {run.failure}")
                await client.sessions.close(started.session)

    async with asyncio.TaskGroup() as group:
        for each in workspaces:
            group.create_task(one(each))


async def main() -> None:
    """Measure and print."""
    options = arguments()
    async with server() as (environment, client, _):
        home = Path(environment["HELMR_HOME"])
        nc = client.wire.nc
        garbage = Garbage(nc, Versions(open_artifacts(nc, topology.VERSIONS, None)), min_age=0)
        async with part(environment, "worker", "--slots", str(options.slots), "--drain", "0"):
            await ready(environment)
            print("before:         ", await look(home))
            made = [(await client.workspaces.create(task="prints")).id for _ in range(options.workspaces)]
            began = time.monotonic()
            await fill(client, made, options.runs // options.workspaces, options.at_a_time)
            load = os.getloadavg()[0]
            print(f"{options.runs} runs, each executed once, in {time.monotonic() - began:.0f} s; load {load:.1f}")
            found = await garbage.find()
            print("after the runs: ", await look(home), f"; blobs {found.kept}, of no use {len(found.garbage)}")
            for each in made:
                await client.workspaces.delete(each)
            await garbage.remove(await garbage.find())
            found = await garbage.find()
            print("deleted:        ", await look(home), f"; blobs {found.kept}, of no use {len(found.garbage)}")
        print("worker stopped: ", await look(home))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workspaces", type=int, default=50)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--at-a-time", type=int, default=8, help="workspaces that have a run at the same time")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
