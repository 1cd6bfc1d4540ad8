"""Runs a task the way the supervisor does: in a process of its own, with pipes and a control socket."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from helmr.guest.protocol import SYNC, SYNCED

REPOSITORY = Path(__file__).parents[2]
#: The task project most tests use.
PROJECT = Path(__file__).parent / "runner_project"

_BOOT = """
import json, os, socket, sys
sys.path.append(sys.argv[1])
sys.stdout.reconfigure(line_buffering=True, errors="surrogateescape")
from helmr.guest import runner
code = runner.main(json.loads(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
os._exit(code)
"""


class TaskProcess:
    """One process executing one task; a context manager that leaves nothing behind."""

    def __init__(
        self, workspace: Path, task_id: str, payload: Any = None, *, flags: tuple[str, ...] = ("-I",), **spec: Any
    ) -> None:
        facts = {
            "run": {"id": "run_1", "metadata": {"from": "start"}},
            "session": {"id": "ses_1"},
            "task": {"id": task_id},
            "workspace": {"id": "ws_1", "path": str(workspace)},
            "attempt": 2,
            "turn": 1,
        }
        order = {"source_path": str(PROJECT), "module": "tasks", "task_id": task_id, "payload": payload, "ctx": facts}
        self.messages: list[dict[str, Any]] = []
        self.stdout = self.stderr = ""
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        with theirs:
            fd = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-B", "-c", _BOOT, str(REPOSITORY), json.dumps({**order, **spec}), str(fd)],
                cwd=workspace,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(fd,),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.sock.close()

    def receive(self) -> dict[str, Any] | None:
        """The next message, None at the end."""
        head = self._exactly(4)
        if head is None:
            return None
        body = self._exactly(struct.unpack(">I", head)[0])
        assert body is not None, "the stream ended in the middle of a message"
        if body == SYNC:  # asked before something is printed after a log line
            self.sock.sendall(struct.pack(">I", len(SYNCED)) + SYNCED)
            return self.receive()
        message: dict[str, Any] = json.loads(body)
        self.messages.append(message)
        return message

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            block = self.sock.recv(size - len(data))
            if not block:
                assert not data, "the stream ended in the middle of a message"
                return None
            data += block
        return data

    def until(self, op: str) -> dict[str, Any]:
        """The first message of this kind from here on."""
        while (message := self.receive()) is not None:
            if message["op"] == op:
                return message
        raise AssertionError(f"no {op} among {[each['op'] for each in self.messages]}")

    def until_line(self, line: bytes) -> None:
        """Read stdout up to this line, which comes next."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == line

    def terminate(self) -> None:
        """Ask the task to stop."""
        self.process.send_signal(signal.SIGTERM)

    def finish(self) -> None:
        """Hear it out."""
        while self.receive() is not None:
            pass
        out, err = self.process.communicate(timeout=20)
        self.stdout, self.stderr = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")

    @property
    def code(self) -> int | None:
        """The exit code."""
        return self.process.returncode

    @property
    def last(self) -> dict[str, Any]:
        """The last message."""
        return self.messages[-1]

    def all(self, op: str) -> list[dict[str, Any]]:
        """Every message of this kind."""
        return [message for message in self.messages if message["op"] == op]


def run(workspace: Path, task_id: str, payload: Any = None, **spec: Any) -> TaskProcess:
    """Run a task to its end, and return what it said."""
    with TaskProcess(workspace, task_id, payload, **spec) as process:
        process.finish()
    return process
