"""A runner for tests of the supervisor: does what ``task["do"]`` names, and nothing that the real runner adds."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from helmr.guest.protocol import LENGTH, MessageReader, encode_message


def main(task: dict[str, Any], sock: socket.socket) -> int:
    """What ``--runner tests.integration.guest_tasks:main`` calls."""
    result: int = globals()[task["do"]](task, sock)
    return result


def code(task: dict[str, Any], _sock: socket.socket) -> int:
    result: int = task["code"]
    return result


def fail(_task: dict[str, Any], _sock: socket.socket) -> int:
    raise ValueError("as asked")


def leave(task: dict[str, Any], _sock: socket.socket) -> int:
    sys.exit(task["code"])


def last_words(_task: dict[str, Any], _sock: socket.socket) -> int:
    atexit.register(os.write, 1, b"exit function\n")
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("buffered", end="")  # noqa: T201
    return 0


def alternate(task: dict[str, Any], sock: socket.socket) -> int:
    for number in range(task["count"]):
        os.write(1 + number % 2, b"%d\n" % number)
        sock.sendall(encode_message({"n": number}))
    return 0


def raw(task: dict[str, Any], sock: socket.socket) -> int:
    """Send a text that may be no message, announced as ``size`` bytes, then wait for the end."""
    text = task["text"].encode()
    sock.sendall(LENGTH.pack(task.get("size", len(text))) + text)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    return 0


def echo(task: dict[str, Any], sock: socket.socket) -> int:
    reader = MessageReader()
    left = task["count"]
    while left:
        for text in reader.feed(sock.recv(100_000)):
            sock.sendall(encode_message({"length": len(text), "echo": json.loads(text).get("n")}))
            left -= 1
    return 0


def hush(_task: dict[str, Any], sock: socket.socket) -> int:
    """Close every way of saying anything, then work on."""
    sock.close()
    os.close(1)
    os.close(2)
    time.sleep(0.05)
    os._exit(6)


def sleep(_task: dict[str, Any], _sock: socket.socket) -> int:
    os.write(1, b"%d\n" % os.getpid())
    time.sleep(60)
    return 0


def flood(task: dict[str, Any], sock: socket.socket) -> int:
    for number in range(task["count"]):
        os.write(1, b"%08d\n" % number * 1000)
        sock.sendall(encode_message({"n": number}))
    return 0
