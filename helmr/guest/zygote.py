"""The fork server: a process that has imported what tasks need, and forks shims, which fork the tasks.

Importing anew would cost each start some 60 ms; forking costs one. It never learns what it starts (see
:mod:`helmr.guest.launch`), so no task can find another's secrets in the memory it inherited.

Run as a script with the request socket as descriptor 3. A request is one byte and one descriptor: the link of a new shim.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import types

if __name__ == "__main__":
    # A script's own folder must not be searched: its modules would shadow those of tasks. The folder of the package comes
    # first while we import, so that no other helmr in the image is taken for this one, and last afterwards.
    _GUEST = os.path.dirname(os.path.abspath(__file__))
    sys.path = [os.path.dirname(os.path.dirname(_GUEST)), *(path for path in sys.path if path != _GUEST)]

from helmr.guest import files, launch, shim, tree
from helmr.guest.signals import SignalPipe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

REQUESTS = 3
#: Milliseconds without a request after which there is time for an import.
_QUIET = 300

_COMMON = (
    *("collections", "contextlib", "dataclasses", "datetime", "functools", "inspect"),
    *("json", "logging", "pathlib", "re", "traceback", "typing"),
)


#: What only some tasks need and costs most: imported when nobody waits for a fork. A third of the time to the first one.
_LATER = ("asyncio",)


class Zygote:
    """Forks shims on request and takes note of their ends."""

    def __init__(self, requests: socket.socket, settings: launch.Settings) -> None:
        self.requests = requests
        self.settings = settings
        self.wakeup = SignalPipe(signal.SIGCHLD)
        #: Our copy of each shim's link: the supervisor sees its end close only after we have cleaned up behind the shim.
        self.links: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Fork on request until the supervisor closes the socket; then wait for the shims, which end because it is gone."""
        poller = select.poll()
        poller.register(self.wakeup, select.POLLIN)
        poller.register(self.requests, select.POLLIN)
        later = list(_LATER)
        while True:
            ready = {fd for fd, _ in poller.poll(_QUIET if later else None)}
            if not ready:
                preload(later.pop())
            if self.wakeup.fileno() in ready:
                self.wakeup.received()
                self.reap(os.WNOHANG)
            if self.requests.fileno() in ready and not self.answer():
                break
        while self.reap(0):
            pass

    def answer(self) -> bool:
        """Fork for one request; False at the end of requests."""
        data, descriptors = files.receive(self.requests, 1, 1)
        if not data:
            return False
        if not descriptors:
            # Out of descriptors: the supervisor has closed its copy, and takes the end of the link for a failed start.
            return True
        link = socket.socket(fileno=descriptors[0])
        try:
            pid = os.fork()
        except OSError as error:
            shim.report(link, detail=f"the process could not be started: {error.strerror}")
            link.close()
        else:
            if pid == 0:
                self.become_shim(link)
            self.links[pid] = link
        return True

    def become_shim(self, link: socket.socket) -> NoReturn:
        """Continue, in the forked child, as shim: nothing of the zygote's own stays open."""
        try:
            self.requests.close()
            for other in self.links.values():
                other.close()
            self.wakeup.forget()
            shim.main(link, self.settings)
        except BaseException:  # noqa: BLE001  (whatever it is, the forked child must not return into the zygote's loop)
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def reap(self, options: int) -> bool:
        """Wait for children (see :func:`helmr.guest.tree.exterminate`); a shim that was killed leaves a tree to be ended."""
        try:
            pid, status = os.waitpid(-1, options)
            while pid:
                link = self.links.pop(pid, None)
                if link is not None and status != 0:
                    tree.exterminate(self.reap, spare=lambda: set(self.links))
                if link is not None:
                    link.close()
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        return True


def preload(*modules: str) -> None:
    """Import modules, and keep what they made out of the collector's way: it would make forked processes copy pages."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def main(arguments: list[str]) -> None:
    """Import, then serve; ``arguments``: workspace, sources, uid, gid, runner (empty: none)."""
    requests = socket.socket(fileno=REQUESTS)
    requests.set_inheritable(False)
    workspace, sources, uid, gid, runner = arguments
    settings = launch.Settings(workspace, sources or None, int(uid) if uid else None, int(gid) if gid else None, runner)
    tree.become_subreaper()
    if settings.uid is not None:
        tree.forbid_new_privileges()
    for module in _COMMON:
        importlib.import_module(module)
    try:
        launch.resolve(runner)
    except Exception as error:  # noqa: BLE001  (the task's own import of it will fail too, where its owner sees it)
        sys.stderr.write(f"helmr: the runner {runner} cannot be imported: {error!r}\n")
    sys.path.append(sys.path.pop(0))
    # Tasks are to find neither our arguments nor this script, which multiprocessing would run again in its children.
    sys.argv = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")
    gc.disable()
    preload()
    Zygote(requests, settings).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
