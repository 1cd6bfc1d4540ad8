"""Receives what the supervisor passes on, for all threads of a task: one that waits reads, and hands out what is for others.

A thread that reads may wait for hours, and one that only wants to print must not wait with it; a thread that does nothing but
read would be in the way of tasks that fork.
"""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from helmr.errors import Unavailable
from helmr.guest import protocol
from helmr.guest.interruption import Interruption

T = TypeVar("T")


class Inbox:
    """What has arrived: how often the supervisor has said that it took everything, and answers by id."""

    def __init__(self, sock: socket.socket, interruption: Interruption) -> None:
        self.synced = 0
        self.answers: dict[int, dict[str, Any]] = {}
        self._sock = sock
        self._interruption = interruption
        self._messages = protocol.MessageReader()
        self._changed = threading.Condition()
        self._reading = False
        self._turns = 0  #: how often a thread has read

    def wait_for(self, look: Callable[[], T | None]) -> T:
        """What ``look`` finds, as soon as it finds something.

        Raises:
            Unavailable: nobody is there any more.
        """
        while True:
            leads = False
            try:
                with self._interruption:  # or an interruption in between would leave us reading for ever
                    seen = self._turns
                    found, leads = self._look(look)
                if found is not None:
                    return found
                if leads:
                    self._read()
                else:
                    self._follow(seen)
            finally:
                if leads:
                    self._stop_reading()

    def _look(self, look: Callable[[], T | None]) -> tuple[T | None, bool]:
        """What is there, or else whether it is on this thread to read."""
        with self._changed:
            found = look()
            if found is not None or self._reading:
                return found, False
            self._reading = True
            return None, True

    def _follow(self, seen: int) -> None:
        """Wait until the thread that reads has taken something."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns != seen)

    def _stop_reading(self) -> None:
        with self._interruption, self._changed:
            self._reading = False
            self._turns += 1
            self._changed.notify_all()

    def _read(self) -> None:
        # Only here may an interruption strike: nothing has been taken from the socket.
        select.select([self._sock], [], [])
        with self._interruption:
            data = self._sock.recv(protocol.CHUNK)
            if not data:
                raise Unavailable("the supervisor of this task no longer listens")
            for text in self._messages.feed(data):
                self._take(text)

    def _take(self, text: bytes) -> None:
        if text == protocol.SYNCED:
            self.synced += 1
            return
        message = json.loads(text)
        if message.get("op") == "answer":
            self.answers[message["id"]] = message
