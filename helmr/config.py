"""Settings, and where each comes from: flags, then ``HELMR_*``, then the project's ``helmr.toml``, then the user's file, then
defaults.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from helmr.durations import seconds
from helmr.errors import ConfigError, UsageError
from helmr.index import RetentionEntry

PROJECT_FILE = "helmr.toml"
DEFAULT_ENV = "dev"
DEFAULT_MODULES = ("tasks",)

#: Projects and environments are tokens of subjects.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SCHEMES = ("nats", "tls", "ws", "wss")
_PROJECT_KEYS = ("project", "env", "modules", "ignore", "url", "keep_logs", "keep_events")
_UNSAID = RetentionEntry()
_USER_KEYS = ("project", "env", "url", "api_key", "home")

Table = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command starts from.

    Attributes:
        url: of the NATS server; None: the local server of ``home``.
        project: None outside of any project; see :meth:`require_project`.
        home: where the local server keeps its store, its database and its connection file; need not exist.
        modules: what defines tasks: modules, packages or folders.
        ignore: patterns of files that are not deployed.
        retention: how long the history keeps logs and events of the environments it is deployed to.
        root: the folder of the task project; None outside of any.
    """

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    project: str | None = None
    env: str = DEFAULT_ENV
    home: Path
    modules: tuple[str, ...] = DEFAULT_MODULES
    ignore: tuple[str, ...] = ()
    retention: RetentionEntry = _UNSAID
    root: Path | None = None

    def require_project(self) -> str:
        """The project.

        Raises:
            ConfigError: none was named anywhere.
        """
        if self.project is None:
            raise ConfigError(
                "no project: this folder and those above it have no helmr.toml",
                hint="change into a task project, make one with `helmr init`, or set HELMR_PROJECT",
            )
        return self.project

    def require_root(self) -> Path:
        """The folder of the task project.

        Raises:
            ConfigError: there is none here.
        """
        if self.root is None:
            raise ConfigError(
                "no task project: this folder and those above it have no helmr.toml",
                hint="change into one, or make one with `helmr init`",
            )
        return self.root


def load(
    start: Path | None = None,
    *,
    url: str | None = None,
    api_key: str | None = None,
    project: str | None = None,
    env: str | None = None,
    home: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings for the folder ``start`` (default: the current one); the other arguments are flags, None where not given.

    Raises:
        ConfigError: a file or variable is wrong; the message names it and the key.
    """
    environ = os.environ if environ is None else environ
    root, table, source = _project_table(Path.cwd() if start is None else start)
    user_file = _user_file(environ)
    user = _checked(_read(user_file), _USER_KEYS, user_file) if user_file.is_file() else {}

    def first(key: str, flag: object, check: Callable[[object, str], str]) -> str | None:
        variable = f"HELMR_{key.upper()}"
        for value, origin in (
            (flag, f"--{key.replace('_', '-')}"),
            (environ.get(variable) or None, variable),
            (table.get(key), f"{source}: {key}"),
            (user.get(key), f"{user_file}: {key}"),
        ):
            if value is not None:
                return check(value, origin)
        return None

    return Settings(
        url=first("url", url, _url),
        api_key=first("api_key", api_key, _text),
        project=first("project", project, _name),
        env=first("env", env, _name) or DEFAULT_ENV,
        home=Path(first("home", home and str(home), _text) or _default_home(environ)).expanduser().absolute(),
        modules=_texts(table.get("modules", DEFAULT_MODULES), f"{source}: modules"),
        ignore=_texts(table.get("ignore", ()), f"{source}: ignore", empty=True),
        retention=RetentionEntry(
            **{name: _days(table[name], f"{source}: {name}") for name in ("keep_logs", "keep_events") if name in table}
        ),
        root=root,
    )


def ensure_home(home: Path) -> Path:
    """Make the home folder, readable to its owner alone, and make sure that it can be written to.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"\0" * 4096)
    except OSError as failure:
        raise ConfigError(
            f"the home folder {home} cannot be used: {_reason(failure)}", hint=_home_hint(failure)
        ) from failure
    return home


def _reason(failure: OSError) -> str:
    return {
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOSPC: "no space is left on the device",
        errno.EDQUOT: "the disk quota is used up",
        errno.ENOTDIR: "a part of its path is a file",
        errno.EEXIST: "it is a file",
    }.get(failure.errno or 0, failure.strerror or str(failure))


def _home_hint(failure: OSError) -> str:
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there, or set HELMR_HOME to a folder on another disk"
    return "set HELMR_HOME to a folder that you can write to"


def _project_table(start: Path) -> tuple[Path | None, Table, str]:
    """The nearest project at or above ``start``: its folder, its settings, and the name of the file they stand in."""
    start = start.absolute()
    for folder in (start, *start.parents):
        file, pyproject = folder / PROJECT_FILE, folder / "pyproject.toml"
        if file.is_file():
            return folder, _project(_read(file), file), str(file)
        if pyproject.is_file():
            tool = _read(pyproject).get("tool", {})
            if isinstance(tool, dict) and "helmr" in tool:
                return folder, _project(tool["helmr"], pyproject), f"{pyproject} [tool.helmr]"
    return None, {}, PROJECT_FILE


def _project(table: object, file: Path) -> Table:
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: [tool.helmr] is not a table")
    if "api_key" in table:
        raise ConfigError(
            f"{file}: api_key does not belong into a project's file, which is shared",
            hint="set HELMR_API_KEY, or put it into ~/.config/helmr/config.toml",
        )
    checked = _checked(table, _PROJECT_KEYS, file)
    if "project" not in checked:
        raise ConfigError(f"{file}: project is missing", hint='add a line such as: project = "agents"')
    return checked


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise ConfigError(f"{file}: not valid TOML: {failure}") from failure
    except OSError as failure:
        raise ConfigError(f"{file}: cannot be read: {failure.strerror}") from failure


def _checked(table: Table, known: Sequence[str], file: Path) -> Table:
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{file}: unknown setting {key!r}", hint=hint)
    return table


def _user_file(environ: Mapping[str, str]) -> Path:
    return _xdg(environ, "XDG_CONFIG_HOME", ".config") / "helmr" / "config.toml"


def _default_home(environ: Mapping[str, str]) -> str:
    return str(_xdg(environ, "XDG_STATE_HOME", ".local/state") / "helmr")


def _xdg(environ: Mapping[str, str], variable: str, below_home: str) -> Path:
    given = environ.get(variable, "")
    if given.startswith("/"):  # the specification has relative ones ignored
        return Path(given)
    return Path(environ.get("HOME") or "~").expanduser() / below_home


def _text(value: object, origin: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise ConfigError(f"{origin}: {value!r} is not a text")


def _name(value: object, origin: str) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ConfigError(
        f"{origin}: {value!r} is not a name",
        hint="use 1 to 63 lower-case letters, digits and -, beginning with a letter or digit",
    )


def _url(value: object, origin: str) -> str:
    text = _text(value, origin)
    if not all(_is_server(each.strip()) for each in text.split(",")):
        raise ConfigError(f"{origin}: {text!r} is not the URL of a NATS server", hint="e.g. nats://127.0.0.1:4222")
    return text


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in _SCHEMES and bool(parts.hostname)


def _texts(value: object, origin: str, *, empty: bool = False) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and (value or empty) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    raise ConfigError(f"{origin}: {value!r} is not a list of texts", hint='write e.g. ["tasks"]')


def _days(value: object, origin: str) -> int | Literal["forever"]:
    """Whole days, at least one."""
    if value == "forever":
        return "forever"
    hint = 'write e.g. "30d", or "forever"'
    if not isinstance(value, str):
        raise ConfigError(f"{origin}: {value!r} is not a duration", hint=hint)
    try:
        days, rest = divmod(seconds(value, what=origin), 86_400)
    except UsageError as failure:
        raise ConfigError(failure.message, hint=hint) from failure
    if days < 1 or rest:
        raise ConfigError(f"{origin}: {value} is not a number of whole days", hint=hint)
    return int(days)
