"""The smallest useful task: a typed payload, a log line, metadata, a file in the workspace, a result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helmr import TaskContext, logger, metadata, task


@dataclass
class Greeting:
    """Whom to greet."""

    name: str = "world"


@task("hello", max_duration="5m")
def hello(payload: Greeting, ctx: TaskContext) -> dict[str, str]:
    """Greet somebody, and leave a note in the workspace."""
    logger.info("greeting", name=payload.name, attempt=ctx.attempt)
    text = f"Hello, {payload.name}!"
    note = Path(ctx.workspace.path, "hello.txt")
    note.write_text(f"{text}\n")
    metadata.set("phase", "done")
    return {"greeting": text, "file": note.name}
