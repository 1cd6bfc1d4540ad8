"""What goes wrong, and when: a plan made from a seed alone, so that a run of the test-bed can be repeated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Literal, get_args

import msgspec

from tests.chaos.installation import Installation

Kind = Literal["kill", "pause", "cut", "hold", "delay"]
KINDS: tuple[str, ...] = get_args(Kind)

WORKERS = ("worker-1", "worker-2", "worker-3")
#: Who may be hit, and how often in relation to the others.
_PROCESSES = {"nats": 2, "server": 2, "control": 2, "projector": 2, **dict.fromkeys(WORKERS, 3)}
#: Who can only be killed.
_KILLED = {"machine": 5}
_CONNECTED = {"client": 1, "server": 1, "control": 1, **dict.fromkeys(WORKERS, 2)}
#: Who may be hit besides, where machines are containers.
_DOCKER_KILLED = {"init": 3, "engine": 3, "containerd": 1}
_DOCKER_PAUSED = {"machine": 5, "engine": 3}
_DOCKER_CONNECTED = {"engine": 4}
#: Seconds without a fault at first, and mean seconds between two.
_CALM, _EVERY = 3.0, 2.5
#: Seconds that a pause lasts: either short, or longer than it takes to be replaced (ack deadline 6 s at the test-bed's pace).
_SHORT, _LONG = (0.3, 3.0), (7.0, 11.0)
#: The same of a container: longer than its worker waits for a word of it (12 s at that pace).
_FROZEN = (13.0, 17.0)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong: ``at`` seconds after the beginning, for ``lasts`` seconds."""

    at: float
    kind: Kind
    target: str
    lasts: float = 0.0

    def __str__(self) -> str:
        span = f" for {self.lasts:.1f} s" if self.lasts else ""
        return f"{self.at:7.2f} s: {self.kind} {self.target}{span}"


def parse(text: str) -> Fault:
    """A fault as ``AT KIND TARGET [SECONDS]``, e.g. ``3 pause worker-1 9``.

    Raises:
        ValueError: it is written otherwise, or names what there is not.
    """
    at, kind, target, *lasts = text.split()
    targets = {*_PROCESSES, *_KILLED, *_CONNECTED, *_DOCKER_KILLED, *_DOCKER_PAUSED, *_DOCKER_CONNECTED}
    if kind not in KINDS or target not in targets:
        raise ValueError(f"{text!r}: there are {', '.join(KINDS)}, of {', '.join(sorted(targets))}")
    return Fault(at=float(at), kind=msgspec.convert(kind, Kind), target=target, lasts=float(lasts[0]) if lasts else 0.0)


def plan(rng: random.Random, *, seconds: float, kinds: tuple[str, ...] = KINDS, engine: str = "process") -> list[Fault]:
    """The faults of a run of the test-bed, in the order they begin."""
    faults = []
    at = _CALM
    while kinds and at < seconds:
        faults.append(_fault(rng, at, rng.choice(kinds), _targets(engine)))
        at += rng.expovariate(1 / _EVERY)
    return faults


def _targets(engine: str) -> dict[str, dict[str, int]]:
    """Who may be killed and paused, and whose connection may be disturbed."""
    targets = {"kill": _PROCESSES | _KILLED, "pause": _PROCESSES, "": _CONNECTED}
    if engine == "docker":
        more = {"kill": _DOCKER_KILLED, "pause": _DOCKER_PAUSED, "": _DOCKER_CONNECTED}
        targets = {kind: known | more[kind] for kind, known in targets.items()}
    return targets


def _fault(rng: random.Random, at: float, kind: str, among: dict[str, dict[str, int]]) -> Fault:
    targets = among.get(kind, among[""])
    target = rng.choices(list(targets), list(targets.values()))[0]
    long = _FROZEN if target == "machine" else _LONG
    span = rng.uniform(*(long if rng.random() < 0.3 else _SHORT))
    if target == "nats":  # a whole installation that stands still shows little
        span = min(span, _SHORT[1])
    lasts = 0.0 if kind == "kill" or (kind == "cut" and rng.random() < 0.5) else round(span, 2)
    return Fault(at=round(at, 2), kind=msgspec.convert(kind, Kind), target=target, lasts=lasts)


async def carry_out(faults: list[Fault], running: Installation, say: Callable[[str], None] = lambda _: None) -> None:
    """Do it all, then undo what lasts."""
    begin = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as tasks:
        for fault in faults:
            await asyncio.sleep(max(begin + fault.at - asyncio.get_running_loop().time(), 0))
            say(str(fault))
            tasks.create_task(_inflict(fault, running))
    running.heal()


async def _inflict(fault: Fault, running: Installation) -> None:
    match fault.kind:
        case "kill":
            await running.kill(fault.target)
        case "pause":
            await running.pause(fault.target, fault.lasts)
        case _:
            await _disturb(fault, running)


async def _disturb(fault: Fault, running: Installation) -> None:
    proxy = running.proxy(fault.target)
    if fault.kind == "delay":
        proxy.delay = min(fault.lasts / 20, 0.3)
    elif fault.kind == "hold":
        proxy.hold()
    else:
        proxy.refuse = fault.lasts > 0
        proxy.cut()
    await asyncio.sleep(fault.lasts)
    proxy.heal()
