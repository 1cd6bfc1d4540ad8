"""How quick programs in a live workspace are: the first byte, the echo of a terminal, fifty at a time, and bytes per second.

    .venv/bin/python -m bench.execs --engine docker --tries 100

The first byte and the echo are taken by the Python client; on Docker, ``docker exec`` in a container of the same image stands
beside the first. Bytes per second are those of ``helmr workspace exec`` with a pipe at either end, the start of the command
included, with the processor time of each part per MiB: a figure that holds on a busy machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import resource
import sys
import time
from collections.abc import AsyncIterator

from bench.installation import Installation, installation
from bench.start import Follower, command, helmr, output, raw_container, spread
from helmr.client import AsyncClient
from helmr.models import ExecChunk

_MIB = 1024**2
_LINES = 100
_CHATTER = f"for i in $(seq {_LINES}); do echo line $i; sleep 0.02; done"


async def first_byte(client: AsyncClient, workspace: str) -> float:
    """Milliseconds until a program's first byte is here; returns when the program has ended, as ``docker exec`` does."""
    began = time.monotonic()
    opened = await client.workspaces.execs.open(workspace, ["echo", "x"], input=False)
    async with opened as process:
        said = aiter(process)
        await anext(said)
        taken = (time.monotonic() - began) * 1e3
        async for _ in said:
            pass
        return taken


async def echoes(client: AsyncClient, workspace: str, tries: int) -> list[float]:
    """Milliseconds from a key to its echo on a terminal, one after the other."""
    taken = []
    opened = await client.workspaces.execs.open(workspace, ["cat"], terminal=(24, 80))
    async with opened as process:
        said = aiter(process)
        for _ in range(tries):
            began = time.monotonic()
            await process.write(b"k")
            await anext(said)
            taken.append((time.monotonic() - began) * 1e3)
            await asyncio.sleep(0.01)
    return taken


async def chatter(client: AsyncClient, workspace: str) -> bool:
    """Whether a program that says something again and again was heard, all of it and in order."""
    opened = await client.workspaces.execs.open(workspace, ["sh", "-c", _CHATTER], input=False)
    async with opened as process:
        said = b"".join([chunk.data async for chunk in _stdout(aiter(process))])
    return said == b"".join(b"line %d\n" % (number + 1) for number in range(_LINES))


async def _stdout(chunks: AsyncIterator[ExecChunk]) -> AsyncIterator[ExecChunk]:
    async for chunk in chunks:
        if chunk.stream == "stdout":
            yield chunk


async def through_the_command(place: Installation, workspace: str, mib: int, *, inwards: bool) -> None:
    """Print how many bytes a second pass through ``helmr workspace exec``, and what that costs."""
    program = ["sha256sum"] if inwards else ["head", "-c", str(mib * _MIB), "/dev/zero"]
    account = place.account()
    before, began = account.read(), time.monotonic()
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "workspace", "exec", workspace, "--", *program),
        env=place.environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    digest = hashlib.sha256()
    feeding = asyncio.create_task(_feed(process.stdin, mib if inwards else 0))
    said = bytearray()
    while data := await process.stdout.read(_MIB):
        said += data[: 64 if inwards else 0]
        digest.update(data)
    await feeding
    assert await process.wait() == 0
    took = time.monotonic() - began
    expected = hashlib.sha256(bytes(mib * _MIB)).hexdigest()
    assert (said.split()[0].decode() if inwards else digest.hexdigest()) == expected, "bytes were lost, or changed"
    used = {name: (now - before[name]) / mib * 1e3 for name, now in account.read().items()}
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used["command"] = (ended.ru_utime + ended.ru_stime - own.ru_utime - own.ru_stime) / mib * 1e3
    parts = ", ".join(f"{name} {each:.2f}" for name, each in used.items() if name != "client")
    print(
        f"{'into' if inwards else 'out of'} it, {mib} MiB: {mib / took:.0f} MiB/s; ms of processor time per MiB: {parts}"
    )


async def _feed(pipe: asyncio.StreamWriter, mib: int) -> None:
    block = bytes(_MIB)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(mib):
            pipe.write(block)
            await pipe.drain()
        pipe.close()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("docker", "process"), default="docker")
    parser.add_argument("--tries", type=int, default=100, help="of the first byte, and of the echo")
    parser.add_argument(
        "--at-a-time", type=int, default=50, help="programs that say something at the same time; 0: none"
    )
    parser.add_argument("--mib", type=int, default=256, help="bytes in, and bytes out; 0: none")
    return parser.parse_args()


def row(name: str, taken: list[float]) -> None:
    """Print one line of the table."""
    p50, p99 = spread(taken)
    print(f"{name:24}{p50:>9.1f}{p99:>9.1f}")


async def main() -> None:
    """Measure and print."""
    options = arguments()
    async with installation(options.engine, 8) as place:
        client = place.client
        follower = Follower(client)
        await follower.listen()
        _, workspace = await helmr(client, follower, None)
        await first_byte(client, workspace)
        print(f"{options.engine} engine; ms{'p50':>20}{'p99':>9}")
        row("first byte", [await first_byte(client, workspace) for _ in range(options.tries)])
        if options.engine == "docker":
            _, container = await raw_container()
            try:
                row(
                    "docker exec",
                    [(await command("docker", "exec", container, "echo", "x")).first_byte for _ in range(20)],
                )
            finally:
                await output("docker", "rm", "-f", container)
        row("echo of a terminal", await echoes(client, workspace, options.tries))
        if options.at_a_time:
            began = time.monotonic()
            heard = await asyncio.gather(*(chatter(client, workspace) for _ in range(options.at_a_time)))
            took = time.monotonic() - began
            print(
                f"{len(heard)} at a time, each {_LINES} lines 20 ms apart: {sum(heard)} heard whole after {took:.1f} s"
            )
        if options.mib:
            for inwards in (True, False):
                await through_the_command(place, workspace, options.mib, inwards=inwards)


if __name__ == "__main__":
    asyncio.run(main())
