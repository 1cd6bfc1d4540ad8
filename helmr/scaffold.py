"""Writes a task project that runs as it stands: what ``helmr init`` leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

from helmr.errors import Conflict

_CONFIG = """\
project = "{name}"
env = "dev"
modules = ["tasks"]
"""

_TASKS = '''\
"""Tasks of {name}. Try one:  helmr session start hello --payload name=Ada --follow"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from helmr import TaskContext, logger, metadata, task


@dataclass
class Greeting:
    name: str = "world"


@task("hello", max_duration="5m")
def hello(payload: Greeting, ctx: TaskContext) -> dict[str, str]:
    """Greet somebody, and leave a note in the workspace."""
    logger.info("greeting", name=payload.name, attempt=ctx.attempt)
    text = f"Hello, {{payload.name}}!"
    Path("hello.txt").write_text(text + "\\n")
    metadata.set("phase", "done")
    return {{"greeting": text}}
'''

_IGNORE = """\
# Files that are not deployed, as in .gitignore; .git, .venv, caches and .env* never are.
*.log
"""


def write_project(folder: Path, name: str | None = None) -> list[Path]:
    """Write ``helmr.toml``, ``tasks.py`` and ``.helmrignore`` into ``folder``, made if need be, and return their paths.

    Args:
        name: of the project; default: made from the folder's name.

    Raises:
        Conflict: one of the files is there already; nothing is written.
        OSError: the folder cannot be written to.
    """
    name = name or project_name(folder)
    texts = {"helmr.toml": _CONFIG, "tasks.py": _TASKS, ".helmrignore": _IGNORE}
    there = [file for file in (*texts, "tasks") if (folder / file).exists()]
    if there:
        raise Conflict(
            f"{folder} has {' and '.join(there)} already", hint="choose an empty folder, or add a task to the one there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, text in texts.items():
        path = folder / file
        with path.open("x", encoding="utf-8") as out:  # x: somebody may have been quicker
            out.write(text.format(name=name) if file != ".helmrignore" else text)
        written.append(path)
    return written


def project_name(folder: Path) -> str:
    """A valid project name made from a folder's name; ``tasks`` when nothing is left of it."""
    plain = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower()).strip("-")
    return plain[:63].rstrip("-") or "tasks"
