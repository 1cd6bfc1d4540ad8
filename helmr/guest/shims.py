"""The supervisor's end of the shims: which of them runs what, and which keep a process ready for the next start.

Forking is most of what a start costs, so it is done ahead: a spare is a process that waits for its order. One of them can
become anything; others are forked from a template that has imported a certain module.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from typing import NamedTuple

from helmr.guest import files, protocol, tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from helmr.guest.child import Child, Ends
    from helmr.guest.forks import Forks

#: Idle shims kept for their templates, and how long (in seconds) all but one of them: each holds a module, and what that
#: imports, in the machine's memory.
_TEMPLATES = 4
_IDLE = 10.0


class Key(NamedTuple):
    """What a template is good for: the tasks of one module of one source, started with the same names in their environment.

    Without a ``module`` it has imported only what is to be imported ahead, and is good for the tasks of any.
    """

    source: str
    module: str
    private: tuple[str, ...]
    preload: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Key | None:
        """What kind of template a process may be forked from; None: from none.

        A module may look for the secrets of its run when it is imported: that is left to the run's own process.
        """
        source, module = spec.get("source"), (spec.get("task") or {}).get("module")
        if spec.get("kind", "task") != "task" or not source or not module:
            return None
        private = {*(spec.get("env") or {}), *(spec.get("secrets") or {})}
        key = cls(source, module, tuple(sorted(private)), tuple(spec.get("preload") or ()))
        return key.without_module() if spec.get("secrets") or spec.get("secret_files") else key

    def order(self) -> bytes:
        """What a process is told that is to become such a template."""
        return json.dumps({"template": self._asdict()}).encode()

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> Key:
        """The template that a worker asks for."""
        return cls(body["source"], body["module"], tuple(body["private"]), tuple(body["preload"]))

    def without_module(self) -> Key | None:
        """The next best: a template that has imported what is to be imported ahead; None: nothing is."""
        return self._replace(module="") if self.module and self.preload else None


class Shim:
    """One shim, and the process tree below it."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.key: Key | None = None  #: of its template; None: it has none
        self.child: Child | None = None
        self.pid = 0  #: once it has told us
        self.idle_since = 0.0
        self.lost = False
        self._selector = selector
        self._link, self.theirs = socket.socketpair()
        self._link.setblocking(False)
        self._said = b""
        selector.register(self._link, selectors.EVENT_READ, self._on_link)

    def prepare(self, child: Child, ends: Ends) -> None:
        """Have a process wait for its order at the far ``ends`` of the child's descriptors.

        Raises:
            OSError: they cannot be handed over.
        """
        self.child = child
        child.shim = self
        files.send(self._link, protocol.ORDER.pack(protocol.PREPARE, 0.0, 0.0), ends.numbers())

    def order(self, kind: bytes, first: float, second: float) -> None:
        """Give an order about the present tree."""
        try:
            self._link.send(protocol.ORDER.pack(kind, first, second))
        except OSError:
            # Its end is closed, and its report, or the lack of one, about to be read.
            return

    def kill(self) -> None:
        """Kill it, and all that is below it; the zygote cleans up behind it. One that has not begun yet has no tree."""
        if self.pid:
            tree.kill([self.pid])

    def close(self) -> None:
        """Let it end, with all that is below it."""
        if not self.lost:
            self.lost = True
            self._selector.unregister(self._link)
            self._link.close()

    def _on_link(self) -> None:
        if self.lost:
            return
        try:
            data = self._link.recv(protocol.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._said += data
        if not data:
            self.close()
            self._finish({"cause": "unknown", "detail": "the process never began, or was ended together with its shim"})
        while b"\n" in self._said:
            line, _, self._said = self._said.partition(b"\n")
            self._heed(json.loads(line))

    def _heed(self, said: dict[str, Any]) -> None:
        if "pid" in said:
            self.pid = said["pid"]
        else:
            self._finish(said)

    def _finish(self, report: dict[str, Any]) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.finish(report)


class Shims:
    """The shims that have nothing to do."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        forks: Forks,
        make_child: Callable[[], Child],
        owner: tuple[int, int] | None,
        highest_fd: int,
    ) -> None:
        self._selector = selector
        self._forks = forks
        self._make_child = make_child
        self._owner = owner
        self._highest_fd = highest_fd
        self._spares: list[Child] = []  #: each has a process that waits for its order
        self._resting: list[Shim] = []  #: without one; the longest rested first, as above
        self._unfit: set[Key] = set()
        self.drop_at: float | None = None  #: when to call :meth:`drop_idle`

    def key_of(self, spec: dict[str, Any]) -> Key | None:
        """The template to use for a process; None: none."""
        key = Key.of(spec)
        while key is not None and key in self._unfit:
            key = key.without_module()
        return key

    def make_template(self, key: Key, patience: float) -> None:
        """Have a template made before anybody wants to be forked from it, and a process of it that waits.

        If nobody wants that meanwhile, its imports may take ``patience`` seconds.
        """
        if key in self._unfit or any(child.shim is not None and child.shim.key == key for child in self._spares):
            return
        child = self.take(None)
        self.prepare(child)
        if child.shim is None or not child.alive:
            return
        child.key = child.shim.key = key
        child.shim.idle_since = time.monotonic()
        child.shim.order(protocol.IMPORT_ORDER, patience, 0.0)
        child.send(key.order(), answer=False)
        self._spares.append(child)
        self.keep_ready()

    def take(self, key: Key | None) -> Child:
        """A child for a start: one that waits already, if possible on a template for ``key``."""
        for wanted in (key, None):
            for child in reversed(self._spares):
                # One that is not prepared any more has hung up, and its shim is about to say that it ended.
                if child.prepared and child.shim is not None and child.shim.key == wanted:
                    self._spares.remove(child)
                    return child
            for shim in reversed(self._resting):
                if shim.key == wanted:
                    self._resting.remove(shim)
                    child = self._make_child()
                    child.shim = shim
                    return child
        return self._make_child()

    def prepare(self, child: Child) -> None:
        """Have a process wait for the orders of a child; one that cannot is finished at once."""
        if child.prepared:
            return
        try:
            with child.open(self._owner) as ends:
                self._check_room(ends)
                if child.shim is None:
                    child.shim = Shim(self._selector)
                    self._forks.request(child.shim)
                child.shim.prepare(child, ends)
        except OSError as error:
            if child.shim is not None:
                child.shim.close()
            child.finish({"detail": f"the process could not be started: {error.strerror}"})

    def _check_room(self, ends: Ends) -> None:
        if max(ends.numbers()) > self._highest_fd:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def keep_ready(self) -> None:
        """Give every resting shim a process that waits, and have one that can become anything."""
        for shim in self._resting:
            child = self._make_child()
            child.shim = shim
            self._add(child)
        self._resting.clear()
        if all(child.shim is not None and child.shim.key for child in self._spares):
            self._add(self._make_child())

    def _add(self, child: Child) -> None:
        self._spares.append(child)
        self.prepare(child)

    def ended(self, child: Child, report: dict[str, Any]) -> bool:
        """Have the shim of a child that has ended rest; False if the child was a spare, whose end is no news."""
        shim, child.shim = child.shim, None
        if child in self._spares:
            self._spares.remove(child)
            if shim is not None:
                shim.close()  # another one would end the same way, and so on, and on
            return False
        if report.get("unfit") and child.key is not None:
            self._unfit.add(child.key)
        if shim is not None and shim.child is child:
            shim.close()  # it has not told us that nothing of the tree is left
        if shim is not None and not shim.lost:
            shim.key = child.key if report.get("template") else None
            shim.idle_since = time.monotonic()
            self._resting.append(shim)
            self._drop_surplus(keyed=True, limit=_TEMPLATES)
            self._drop_surplus(keyed=False, limit=1)
            self._plan_drop()
        return True

    def drop_idle(self, now: float) -> None:
        """Let go of templates that were needed for a while only; the one used last stays."""
        idle = self._idle(keyed=True)
        late = [shim for shim in idle[:-1] if shim.idle_since + _IDLE <= now]
        self._drop_surplus(keyed=True, limit=len(idle) - len(late))
        self._plan_drop()

    def _plan_drop(self) -> None:
        idle = self._idle(keyed=True)
        self.drop_at = idle[0].idle_since + _IDLE if len(idle) > 1 else None

    def _idle(self, *, keyed: bool) -> list[Shim]:
        """The idle ones with a template, or those without; the longest idle first."""
        idle = [*self._resting, *(child.shim for child in self._spares if child.shim is not None)]
        return sorted((shim for shim in idle if (shim.key is not None) == keyed), key=lambda shim: shim.idle_since)

    def _drop_surplus(self, *, keyed: bool, limit: int) -> None:
        idle = self._idle(keyed=keyed)
        for shim in idle[: max(len(idle) - limit, 0)]:
            if shim in self._resting:
                self._resting.remove(shim)
                shim.close()
            elif shim.child is not None:
                shim.child.finish({})

    def close(self) -> None:
        """Let all of them end."""
        for child in list(self._spares):
            child.finish({})
        for shim in self._resting:
            shim.close()
