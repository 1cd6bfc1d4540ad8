"""The place a task runs in, as its author describes it: an image, its resources, where the workspace is, what it may reach."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from helmr import registry
from helmr.declarations import Secret, checked_name
from helmr.errors import ProjectError
from helmr.registry import Location, caller_location

DEFAULT_BASE = "python:3.12-slim"
DEFAULT_MEMORY = 2 * 1024**3
DEFAULT_DISK = 10 * 1024**3
DEFAULT_PIDS = 512

#: Less than this and Python with the supervisor does not start reliably.
MIN_MEMORY = 64 * 1024**2
#: Modules that can be imported ahead: what they import in turn is not counted.
MAX_PRELOAD = 64

Step = tuple[str, ...]
#: The kind of a step that runs a command with secrets: the command, then ``VARIABLE=secret`` for each.
SECRET_RUN = "secret-run"  # noqa: S105  # no password

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_WORD = re.compile(r"[^\s-][^\s]*")
_HOST = re.compile(
    r"(?P<below>\*\.)?(?P<name>([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)"
    r"(:(?P<port>\d{1,5}))?"
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_size(value: int | str, *, what: str = "size") -> int:
    """Bytes: ``"512MiB"``, ``"4GiB"`` (powers of 1024), ``"2GB"`` (powers of 1000), or a number of bytes.

    Raises:
        ProjectError: it is written in no known form, or not above zero.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        result = value
    else:
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            raise ProjectError(
                f"{caller_location()}: {what} {value!r} is not a size",
                hint='write "512MiB", "4GiB", "2GB" or a number of bytes',
            )
        unit = match[2].lower()
        result = int(float(match[1]) * (1024 if "i" in unit else 1000) ** _POWERS[unit[0]])
    if result <= 0:
        raise ProjectError(f"{caller_location()}: {what} {value!r} is not above zero")
    return result


def parse_host(text: str) -> tuple[str, bool, int | None]:
    """An entry of a list of hosts: the name in lower case, whether names below it are meant instead, and the port, if any.

    Raises:
        ValueError: it is none.
    """
    match = _HOST.fullmatch(text)
    if match is None or not 0 < int(match["port"] or 1) < 65536:
        raise ValueError(f"{text!r} is not a host")
    return match["name"].lower(), match["below"] is not None, int(match["port"]) if match["port"] else None


def check_network(value: object) -> str | tuple[str, ...]:
    """A network policy in the form that is kept: ``"internet"``, ``"none"`` or a tuple of hosts.

    Raises:
        ValueError: it is none.
    """
    if value in ("internet", "none"):
        return str(value)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"network={value!r} is not a network policy")
    for host in value:
        parse_host(str(host))
    return tuple(map(str, value))


def check_preload(value: object) -> tuple[str, ...]:
    """The modules to be imported ahead, in the form that is kept: a tuple of dotted names.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > MAX_PRELOAD:
        raise ValueError(f"preload={value!r} is not a list of modules, {MAX_PRELOAD} at most")
    for name in value:
        if not isinstance(name, str) or not all(map(_is_identifier, name.split("."))):
            raise ValueError(f"preload names {name!r}, which is not the name of a module")
    return tuple(dict.fromkeys(value))


def _is_identifier(word: str) -> bool:
    return word.isidentifier() and not keyword.iskeyword(word)


@dataclass(frozen=True)
class Image:
    """A container image: a base and steps on top of it. Every method returns a new image and leaves this one as it is.

    Steps are recorded as ``(kind, argument, …)`` in the order they are called, and built by the engine with its own builder,
    cached by content. Any base with Python 3.10 or later works.
    """

    base: str = DEFAULT_BASE
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.base, str) or not _WORD.fullmatch(self.base):
            raise ProjectError(
                f"{caller_location()}: {self.base!r} is not an image name", hint=f'e.g. "{DEFAULT_BASE}"'
            )

    def _with(self, *step: str) -> Image:
        return Image(self.base, (*self.steps, step))

    def apt(self, *packages: str) -> Image:
        """Install Debian packages."""
        return self._with("apt", *_words("apt", packages))

    def pip(self, *requirements: str) -> Image:
        """Install Python packages, each a requirement such as ``"httpx>=0.28"``."""
        for requirement in requirements:
            _text("pip", requirement)
        return self._with("pip", *_some("pip", requirements))

    def run(self, command: str, *, secrets: Sequence[Secret] = ()) -> Image:
        """Run a shell command while building.

        Secrets are variables of this command alone: no layer, no history and no ``docker inspect`` has them, unless the command
        itself writes them into a file. The image is built again when the command changes, not when the value of a secret does.
        """
        if not secrets:
            return self._with("run", _text("run", command))
        names = [_variable(secret) for secret in secrets]
        return self._with(SECRET_RUN, _text("run", command), *names)

    def copy(self, src: str, dst: str) -> Image:
        """Copy a file or folder of the task project (``src``, relative to its root) to ``dst``."""
        _text("copy", dst)
        if _text("copy", src).startswith("/") or ".." in src.split("/"):
            raise ProjectError(
                f"{caller_location()}: Image.copy({src!r}, …) leaves the task project",
                hint="give a path below the project's root, e.g. copy('assets', '/opt/assets')",
            )
        return self._with("copy", src, dst)

    def env(self, **variables: str) -> Image:
        """Set environment variables, for later steps and for tasks. Not for secrets: they would stay in the image."""
        for name in _some("env", tuple(variables)):
            if not _ENV_NAME.fullmatch(name):
                raise ProjectError(f"{caller_location()}: Image.env() cannot set a variable called {name!r}")
        return self._with("env", *(f"{name}={_line('env', value)}" for name, value in variables.items()))

    def workdir(self, path: str) -> Image:
        """Change the folder that later steps run in."""
        return self._with("workdir", _line("workdir", _text("workdir", path)))

    def user(self, name: str) -> Image:
        """Change the user that later steps run as."""
        return self._with("user", _line("user", _text("user", name)))


def _variable(secret: object) -> str:
    """``VARIABLE=name`` for a secret that a step of an image gets."""
    if not isinstance(secret, Secret) or secret.env is None or secret.file is not None:
        raise ProjectError(
            f"{caller_location()}: Image.run() cannot be given {secret!r}",
            hint='it takes secrets that go into a variable: Secret("name", env="NAME")',
        )
    return f"{secret.env}={secret.name}"


def step_variables(arguments: Sequence[str]) -> dict[str, str]:
    """Which secret goes into which variable in a :data:`SECRET_RUN` step; ``arguments``: what follows its command."""
    return dict(word.split("=", 1) for word in arguments if "=" in word)


def _some(kind: str, values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ProjectError(f"{caller_location()}: Image.{kind}() was given nothing")
    return values


def _text(kind: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ProjectError(f"{caller_location()}: Image.{kind}() takes text, not {value!r}")
    return value


def _line(kind: str, value: object) -> str:
    if isinstance(value, str) and "\n" not in value:
        return value
    raise ProjectError(f"{caller_location()}: Image.{kind}() takes one line of text, not {value!r}")


def _words(kind: str, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in _some(kind, values):
        if not isinstance(value, str) or not _WORD.fullmatch(value):
            raise ProjectError(f"{caller_location()}: Image.{kind}() takes names, one per argument, not {value!r}")
    return values


@dataclass(frozen=True, init=False)
class Sandbox:
    """Where a task runs. Two sandboxes of one name must be the same.

    Args:
        image: default: the default base without steps.
        cpu: cores; a fraction is fine.
        memory: ``"4GiB"``, or bytes.
        workspace: the folder the workspace is mounted at, and that tasks start in.
        network: ``"internet"`` (what is public), ``"none"``, or the hosts that may be reached, e.g. ``"*.example.com:8443"``.
        disk: what the workspace's files may take of the disk; a run that is found to exceed it fails with ``disk_full``.
        pids: processes and threads at once.
        preload: modules that are imported ahead of the runs, so that these find them imported: without secrets, environment
            and payload of a run, and in a process that runs are forked from.

    Raises:
        ProjectError: a value that cannot be used, or another sandbox of this name that differs.
    """

    name: str
    image: Image
    cpu: float
    memory: int
    workspace: str
    network: str | tuple[str, ...]
    disk: int
    pids: int
    preload: tuple[str, ...]
    location: Location = field(repr=False, compare=False)

    def __init__(
        self,
        name: str,
        *,
        image: Image | str | None = None,
        cpu: float = 2,
        memory: int | str = DEFAULT_MEMORY,
        workspace: str = "/workspace",
        network: str | Sequence[str] = "internet",
        disk: int | str = DEFAULT_DISK,
        pids: int = DEFAULT_PIDS,
        preload: Sequence[str] = (),
    ) -> None:
        place = caller_location()
        values = {
            "name": checked_name("sandbox", name, place),
            "image": Image(image) if isinstance(image, str) else image or Image(),
            "cpu": float(cpu),
            "memory": parse_size(memory, what="memory"),
            "workspace": workspace.rstrip("/"),
            "network": _network(network, place),
            "disk": parse_size(disk, what="disk"),
            "pids": pids,
            "preload": _preload(preload, place),
            "location": place,
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        self._check(place)
        registry.declare("sandbox", registry.sandboxes, name, self, place)

    def _check(self, place: Location) -> None:
        def require(fits: bool, what: str) -> None:
            if not fits:
                raise ProjectError(f"{place}: sandbox {self.name!r}: {what}")

        require(0 < self.cpu <= 1024, f"cpu={self.cpu!r} is not a number of cores")
        require(self.memory >= MIN_MEMORY, f"memory is less than {MIN_MEMORY >> 20} MiB")
        require(isinstance(self.pids, int) and self.pids >= 16, f"pids={self.pids!r} is less than 16")
        path = self.workspace
        absolute = path.startswith("/") and not {"", ".", ".."} & set(path[1:].split("/"))
        require(absolute, f"workspace={path!r} is not an absolute path other than /")
        taken = path.split("/")[1] in {"bin", "dev", "etc", "lib", "proc", "run", "sbin", "sys", "tmp", "usr"}
        require(not taken, f"workspace={path!r} lies in a folder of the system")


def _network(value: object, place: Location) -> str | tuple[str, ...]:
    try:
        return check_network(value)
    except ValueError as error:
        raise ProjectError(
            f"{place}: network={value!r} is not a network policy: {error}",
            hint='write "internet", "none", or a list of hosts such as ["api.example.com", "*.example.org:8443"]',
        ) from error


def _preload(value: object, place: Location) -> tuple[str, ...]:
    try:
        return check_preload(value)
    except ValueError as error:
        raise ProjectError(f"{place}: {error}", hint='name modules: preload=["json", "package.module"]') from error


#: What a task without a sandbox runs in.
DEFAULT_NAME = "default"
