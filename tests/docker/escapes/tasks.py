"""Hostile tasks: one makes all attempts of ``attempts.py``, one leaves traps in its files, one has a secret."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import attempts  # type: ignore[import-not-found]  # a module of the deployment

from helmr import Sandbox, Secret, TaskContext, task

box = Sandbox("hostile", memory="128MiB", pids=64)


@task("escape", sandbox=box)
def escape(payload: dict[str, Any]) -> dict[str, str]:
    """Make every attempt; what came of each."""
    made: dict[str, str] = attempts.make(payload | {"source": str(Path(__file__).parent)})
    return made


@task("confidant", sandbox=box, secrets=[Secret("TOKEN", env="TOKEN")])
def confidant() -> str:
    """Have a secret until somebody puts an end to it."""
    Path("has it").write_text(str(len(os.environ["TOKEN"])))
    print(os.environ["TOKEN"])
    time.sleep(120)
    return "never"


@task("trap", sandbox=box)
def trap(ctx: TaskContext) -> int:
    """Leave in the workspace what might lead a careless reader out of it, or make it wait for ever."""
    here = Path(ctx.workspace.path)
    (here / "shadow").symlink_to("/etc/shadow")
    (here / "up").symlink_to("../../..")
    (here / "loop").symlink_to("loop")
    (here / "self").symlink_to("/proc/self")
    os.mkfifo(here / "pipe")
    (here / "folder").mkdir()
    (here / "folder" / "file").write_text("plain")
    (here / "root").write_text("x")
    (here / "root").chmod(0o6777)
    (here / "\x1b]0;title\x07").write_text("a name that is a command")
    (here / "log").write_text("\x1b[2J")
    print("\x1b]0;owned\x07\x1b[2J")
    return len(list(here.iterdir()))
