"""What a worker asks of a container engine: an interface small enough that plain child processes fit it too.

Two implementations exist, :mod:`worker.docker_engine` and :mod:`worker.process_engine`;
``tests/docker/test_engine_conformance.py``
holds both to the same behaviour. A worker keeps at most one :class:`Machine` (a live container with a supervisor in it) per
workspace; runs, execs and PTYs are :class:`Process` es inside it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from helmr.errors import ImageError, Unavailable

#: No network at all, whatever is public, or these hosts: see :func:`helmr.sandbox.check_network`.
Network = Literal["none", "internet"] | tuple[str, ...]
Progress = Callable[[str], None]
#: Asks for the values of the secrets that an image is built with, by name.
BuildSecrets = Callable[[], Awaitable[Mapping[str, str]]]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one workspace's container may use."""

    cpu: float = 2.0  #: cores
    memory: int = 2 * 1024**3  #: bytes
    pids: int = 512
    disk: int = 10 * 1024**3  #: bytes; see :mod:`worker.disk_watch`


class ImageSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An image as a task project defines it: a base and build steps, in order.

    A step is ``[kind, arguments…]`` with kind one of ``run, secret-run, apt, pip, copy, env, workdir, user``, as
    ``helmr.Image`` records it. ``context`` is the folder ``copy`` steps are relative to (the unpacked deployment);
    other content is in another folder.
    """

    base: str = "python:3.12-slim"
    steps: tuple[tuple[str, ...], ...] = ()
    context: Path | None = None


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A process of a machine that others are forked from, having imported what they need (:mod:`helmr.guest.shims`)."""

    source: str  #: the name of a source tree that is in the machine
    module: str  #: which tasks it is for; empty: those of any module
    private: tuple[str, ...]  #: names in the environment of the processes, sorted: an import must not ask for them
    preload: tuple[str, ...]  #: modules to be imported ahead of the tasks' own


class Provision(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine that is started ahead has in it, before anybody knows whose it will be: the code of one deployment."""

    owner: str  #: whose code it is, and so for whose workspaces alone the machine is: a project and environment
    source: str
    tree: Path  #: the folder to copy the source from
    template: Template | None = None


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to bring one workspace to life."""

    workspace_id: str
    worker_id: str
    #: Which of the claims of the workspace, in the order of the log, the machine is made under.
    claim: int = 0
    image: str  #: what :meth:`Engine.ensure_image` returned
    mount_path: str = "/workspace"
    limits: Limits = Limits()
    network: Network = "internet"
    labels: dict[str, str] = {}
    #: What will be executed in it first, so that a machine which has that ready can be taken, and more like it be made.
    provision: Provision | None = None


def superseded(workspace_id: str) -> Unavailable:
    """The error of whoever wants to make a machine, and was replaced by another worker of this host meanwhile."""
    return Unavailable(f"workspace {workspace_id} has been given to another worker of this host meanwhile")


class ImageGone(ImageError):
    """The image was there, and has been removed meanwhile."""


class SecretFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that holds a secret: in memory, the task's own, removed when the process has ended."""

    path: str
    mode: int = 0o400
    value: str

    def __repr__(self) -> str:
        return f"SecretFile({self.path!r})"


class Terminal(msgspec.Struct, frozen=True, kw_only=True):
    """The size of a terminal, in characters."""

    rows: int = 24
    columns: int = 80


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process tree to start in a machine.

    ``kind="task"`` forks the machine's zygote and calls ``helmr.guest.runner.main(task, sock)``; ``kind="argv"`` executes
    ``argv``; ``kind="files"`` sends or receives files (:mod:`helmr.guest.transfer`) as ``task`` says. The latter two have an
    ``input``, or a ``terminal`` in the place of input, output and errors, if asked for.

    ``secrets`` are added to the environment of this process alone and are written nowhere; ``secret_files`` are
    there for as long as the process.
    """

    id: str  #: unique within the machine; used in logs and for re-attachment
    kind: Literal["task", "argv", "files"] = "task"
    argv: tuple[str, ...] = ()
    input: bool = False
    terminal: Terminal | None = None
    env: dict[str, str] = {}
    secrets: dict[str, str] = {}
    secret_files: tuple[SecretFile, ...] = ()
    cwd: str | None = None  #: from the workspace's mount path on, which is the default
    source: str | None = None  #: name of a source tree that :meth:`Machine.put_source` delivered
    task: dict[str, Any] = {}  #: handed to the runner as it is
    preload: tuple[str, ...] = ()  #: modules that the process should find imported
    deadline: float | None = None  #: seconds from the start of the process until it is terminated
    grace: float = 10.0  #: seconds between SIGTERM and SIGKILL, for deadline and cancel

    def __repr__(self) -> str:
        return f"ProcessSpec({self.id!r})"  # neither payload nor secrets: it may end up in a log


class Output(msgspec.Struct, frozen=True, tag="output"):
    """Bytes the process tree wrote; ``offset`` counts the bytes of this stream before these."""

    stream: Literal["stdout", "stderr"]
    offset: int
    data: bytes


class Message(msgspec.Struct, frozen=True, tag="message"):
    """One JSON object from the task's control channel (``op``: started, log, metadata, output, result, error, cancelled)."""

    body: dict[str, Any]


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """The last frame of a process: its whole tree is gone.

    ``exit_code`` is None when a signal ended the main process. ``cause`` says who ended it: the process itself (``exit``),
    a cancel, the deadline, or the loss of the machine; it is ``unknown`` when what watched over the process was ended together
    with it, so that nobody can tell. ``oom`` is true when the kernel killed a process of the tree for
    memory.
    """

    exit_code: int | None = None
    signal: int | None = None
    oom: bool = False
    cause: Literal["exit", "cancel", "deadline", "lost", "unknown"] = "exit"
    detail: str = ""


Frame = Output | Message | Exited


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What :meth:`Engine.check` found out; ``host`` identifies where this engine keeps its workspaces, over restarts."""

    name: str
    version: str
    host: str
    isolated: bool
    notes: tuple[str, ...] = ()


class Process(Protocol):
    """A process tree inside a machine."""

    id: str

    def frames(self) -> AsyncIterator[Frame]:
        """Everything the tree says, in order, ending with exactly one :class:`Exited`.

        Asking for the next frame acknowledges the one before. What is not taken is bounded (the supervisor stops reading the
        pipes, and the task blocks), so a slow reader costs no memory.
        """
        ...

    @property
    def at(self) -> int:
        """The number of the frame that was handed out last, counted from 1 over the life of the process."""
        ...

    @property
    def backlog(self) -> float:
        """How much of what may be unacknowledged is: at 1 nothing more comes. Only when frames are settled by hand."""
        ...

    def settle_by_hand(self) -> None:
        """Have no frame be acknowledged by the asking for the next, but by :meth:`settle`."""
        ...

    def settle_as_taken(self) -> None:
        """Settle what was taken, and from now on by asking for the next."""
        ...

    def settle(self, sequence: int) -> None:
        """Acknowledge the frames up to this one: nobody will ever need them again, whoever dies when."""
        ...

    async def send(self, body: dict[str, Any]) -> None:
        """Deliver one JSON object to the task's control channel."""
        ...

    def feed(self, data: bytes) -> None:
        """Pass bytes on to the process' input; what it has not taken yet must stay within bounds that the caller sets.

        Raises:
            Unavailable: the machine is gone.
        """
        ...

    def end_input(self) -> None:
        """Have the input end after what was fed."""
        ...

    def on_taken(self, listener: Callable[[int], None]) -> None:
        """Have ``listener`` told how many bytes of its input the process has taken so far, or will never take."""
        ...

    def resize(self, size: Terminal) -> None:
        """Give the process' terminal another size."""
        ...

    def signal(self, number: int) -> None:
        """Signal the main process and its group."""
        ...

    async def limit(self, deadline: float, grace: float) -> None:
        """Replace the deadline, by one in ``deadline`` seconds from now; one that has passed stands."""
        ...

    async def cancel(self, grace: float) -> None:
        """Ask for the end: SIGTERM to the tree, SIGKILL after ``grace`` seconds. :class:`Exited` follows when all is gone."""
        ...


class Machine(Protocol):
    """A live workspace: a container (or, for the process engine, a supervisor process) that can run process trees."""

    workspace_id: str
    #: The container's id, or the supervisor's pid, for people and for the event log.
    ref: str
    #: Whether it was started ahead, and became the workspace's afterwards.
    adopted: bool

    def sources(self) -> set[str]:
        """The names of the sources that were delivered."""
        ...

    def claimed(self, claim: int) -> None:
        """Take note that the workspace has been claimed anew for this machine, which was there before."""
        ...

    async def put_source(self, name: str, tree: Path) -> None:
        """Make a copy of the folder ``tree`` readable to tasks as source ``name``; doing it twice is free."""
        ...

    async def start(self, spec: ProcessSpec) -> Process:
        """Start a process tree.

        Raises:
            Unavailable: the machine is gone.
            Conflict: a process with this id exists already.
        """
        ...

    async def stop(self, grace: float = 2.0) -> None:
        """End every process and the machine itself; the workspace's files stay. Stopping twice is fine."""
        ...

    async def wait_lost(self) -> str:
        """Return, with the reason, when the machine has ended for whatever reason (stop included)."""
        ...


class Inheritance(NamedTuple):
    """A live machine that a dead worker of this home has left, whose it was, and the processes in it, by their ids."""

    machine: Machine
    former: str
    processes: Mapping[str, Process]


class Engine(Protocol):
    """Where machines come from. Built once per worker; safe to use from many tasks at once."""

    name: str

    @property
    def owner(self) -> tuple[int, int] | None:
        """The user and group that the files of workspaces belong to; None: the worker's own."""
        ...

    def files(self, workspace_id: str) -> Path:
        """The folder of this host that has the workspace's files, or would have them."""
        ...

    async def check(self) -> EngineInfo:
        """Find out whether the engine works.

        Raises:
            EngineUnavailable: it does not, with what to do about it as hint.
        """
        ...

    def retire(self, owner: str, source: str) -> None:
        """The code of ``owner`` is ``source`` from now on: let go of machines that have other code of theirs ready."""
        ...

    def guard(self, servers: tuple[tuple[str, int], ...]) -> None:
        """Keep the machines to come away from these servers (host and port), whatever else they may reach."""
        ...

    async def ensure_image(self, spec: ImageSpec, progress: Progress, secrets: BuildSecrets | None = None) -> str:
        """The reference of the image for ``spec``, building or pulling it if need be; concurrent calls build once.

        ``secrets`` is asked only if a step that needs some is executed.

        Raises:
            ImageError: with the end of the builder's output in ``details["log"]``.
        """
        ...

    async def materialize(self, spec: MachineSpec) -> Machine:
        """A live machine for the workspace, its files as they were left; ready to start processes.

        What an earlier, lost machine of the same workspace left running (a dead worker's container) is removed first. A network
        policy that the engine cannot enforce is refused.

        Raises:
            Unavailable: there is a machine of a later claim, which is left alone: whoever asks here was replaced.
        """
        ...

    async def delete(self, workspace_id: str) -> None:
        """Remove whatever is live of the workspace, and its files."""
        ...

    async def inherit(self, worker_id: str, living: set[str]) -> list[Inheritance]:
        """Take over the machines of workspaces whose workers are not among the ``living``, as far as they still answer.

        They are ``worker_id``'s from then on, here: what the log says of the workspaces is for the caller to find out. No two
        workers get the same.
        """
        ...

    async def collect(self, live_workers: set[str], *, spare_running: bool = False) -> list[str]:
        """Remove machines of workers that are not in ``live_workers``; files stay. Returns the refs removed.

        With ``spare_running``, machines of workspaces that have not ended are left: a successor of their worker may come and
        inherit them, and without one they end by themselves.
        """
        ...

    async def close(self) -> None:
        """Stop every machine this engine started and release its resources."""
        ...
