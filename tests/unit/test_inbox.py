"""Several threads of a task wait for what the supervisor passes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helmr.errors import Unavailable
from helmr.guest import protocol
from helmr.guest.inbox import Inbox
from helmr.guest.interruption import Interruption

_SYNCED = protocol.LENGTH.pack(len(protocol.SYNCED)) + protocol.SYNCED


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Inbox]]:
    """The supervisor's end, and the task's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, Inbox(theirs, Interruption())


def _answer(ident: int, **rest: Any) -> bytes:
    return protocol.encode_message({"op": "answer", "id": ident, **rest})


def test_each_thread_gets_its_answer_whoever_reads(ends: tuple[socket.socket, Inbox]) -> None:
    ours, inbox = ends
    found: dict[int, Any] = {}

    def wait(ident: int) -> None:
        found[ident] = inbox.wait_for(lambda: inbox.answers.pop(ident, None))["n"]

    threads = [threading.Thread(target=wait, args=(ident,)) for ident in range(8)]
    for thread in threads:
        thread.start()
    for ident in reversed(range(8)):
        ours.sendall(_answer(ident, n=ident * 2))
    for thread in threads:
        thread.join(20)
    assert found == {ident: ident * 2 for ident in range(8)}


def test_a_thread_that_waits_for_long_is_in_nobodys_way(ends: tuple[socket.socket, Inbox]) -> None:
    ours, inbox = ends
    long = threading.Thread(target=lambda: inbox.wait_for(lambda: inbox.answers.pop(1, None)), daemon=True)
    long.start()
    for _ in range(3):
        taken = inbox.synced
        ours.sendall(_SYNCED)
        assert inbox.wait_for(lambda taken=taken: inbox.synced > taken or None)  # type: ignore[misc]
    ours.sendall(_answer(1))
    long.join(20)
    assert not long.is_alive()


def test_messages_in_pieces_and_several_at_once(ends: tuple[socket.socket, Inbox]) -> None:
    ours, inbox = ends
    text = _answer(1, data="x" * 1000) + _SYNCED + _answer(2)

    def send() -> None:
        for at in range(0, len(text), 100):
            ours.sendall(text[at : at + 100])

    sender = threading.Thread(target=send)
    sender.start()
    assert inbox.wait_for(lambda: inbox.answers.pop(2, None)) == {"op": "answer", "id": 2}
    sender.join()
    assert inbox.synced == 1
    assert len(inbox.answers.pop(1)["data"]) == 1000


def test_a_supervisor_that_is_gone_is_told_of(ends: tuple[socket.socket, Inbox]) -> None:
    ours, inbox = ends
    ours.close()
    with pytest.raises(Unavailable):
        inbox.wait_for(lambda: None)
