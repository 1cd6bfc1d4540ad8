"""Where a secret may be put: rules that keep its value out of workspace versions and its name out of the loader's way.

They apply when a task declares a secret, and again when a deployment arrives: not every client has to be ours.
"""

from __future__ import annotations

import posixpath
import re

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Variables that decide what code a process loads, or that Helmr itself sets: a secret there is a mistake at best.
_RESERVED = re.compile(
    r"(LD|DYLD|PYTHON|HELMR|GCONV|MALLOC|GLIBC)_.*|PYTHON.*"
    r"|PATH|HOME|SHELL|ENV|BASH_ENV|IFS|PS4|PROMPT_COMMAND|NODE_OPTIONS|PERL5OPT|PERL5LIB|RUBYOPT|JAVA_TOOL_OPTIONS"
)
#: The only place for files: memory of the container, closed to all but the supervisor and the files' owner.
FOLDER = "/run/"
_MODES = 0o777


def env_problem(name: str) -> str | None:
    """What is wrong with an environment variable of this name; None if nothing is."""
    if not _ENV_NAME.fullmatch(name):
        return f"{name!r} is not the name of an environment variable"
    if _RESERVED.fullmatch(name.upper()):
        return f"the variable {name} changes how programs are loaded, or is Helmr's own"
    return None


def file_problem(path: str, mode: int) -> str | None:
    """What is wrong with a file at this path, with this mode; None if nothing is."""
    if not path.startswith(FOLDER) or posixpath.normpath(path) != path or "\0" in path:
        return f"{path!r} is not a plain path below {FOLDER}, e.g. {FOLDER}secrets/token"
    if isinstance(mode, bool) or not isinstance(mode, int) or mode & ~_MODES or not mode & 0o400:
        return f"mode {mode!r} is not one that its owner can read with, e.g. 0o400"
    return None
