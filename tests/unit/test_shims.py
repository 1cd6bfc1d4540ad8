"""Which shim a start gets, and which of the idle ones are kept."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helmr.guest import files
from helmr.guest.child import Child
from helmr.guest.shims import Key, Shim, Shims

_SPEC = {"source": "src", "task": {"module": "tasks"}, "env": {"HELMR_RUN_ID": "run_1"}}


class _Forks:
    """Forks nobody."""

    def __init__(self) -> None:
        self.kept: list[socket.socket] = []

    def request(self, shim: Shim) -> None:
        self.kept.append(shim.theirs)


class _Pool:
    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.forks = _Forks()
        self.children: list[Child] = []
        self.shims = Shims(self.selector, self.forks, self.make_child, None, 1000)  # type: ignore[arg-type]
        self.shims.keep_ready()

    def make_child(self) -> Child:
        self.children.append(Child(self.selector, self.ended, lambda *_: None, lambda *_: None))
        return self.children[-1]

    def ended(self, child: Child, report: dict[str, Any]) -> None:
        self.shims.ended(child, report)

    def close(self) -> None:
        for child in self.children:
            child.finish({})
        self.shims.close()
        for end in self.forks.kept:
            end.close()
        self.selector.close()

    def start(self, key: Key | None) -> Child:
        child = self.shims.take(key)
        child.key = key
        self.shims.prepare(child)
        self.shims.keep_ready()
        return child

    def end(self, child: Child, **report: Any) -> Shim:
        shim = child.shim
        assert shim is not None
        shim.child = None
        child.finish(report)
        return shim

    def turn(self) -> None:
        """Heed what there is to heed."""
        while ready := self.selector.select(0):
            for key, _ in ready:
                key.data()

    def many(self, key: Key, count: int) -> list[Shim]:
        return [self.end(child, template=True) for child in [self.start(key) for _ in range(count)]]


@pytest.fixture
def pool() -> Iterator[_Pool]:
    pool = _Pool()
    yield pool
    pool.close()


def _key(module: str = "tasks") -> Key:
    return Key("src", module, ("HELMR_RUN_ID",))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, _key()),
        ({"env": {}}, Key("src", "tasks", ())),
        ({"preload": ["json"]}, Key("src", "tasks", ("HELMR_RUN_ID",), ("json",))),
        ({"preload": ["json"], "secrets": {"TOKEN": "x"}}, Key("src", "", ("HELMR_RUN_ID", "TOKEN"), ("json",))),
        ({"preload": ["json"], "secret_files": [{"path": "/run/x"}]}, Key("src", "", ("HELMR_RUN_ID",), ("json",))),
        ({"kind": "argv"}, None),
        ({"source": None}, None),
        ({"task": {}}, None),
        ({"secrets": {"TOKEN": "x"}}, None),
        ({"secret_files": [{"path": "/run/x"}]}, None),
    ],
)
def test_what_a_process_may_be_forked_from(change: dict[str, Any], key: Key | None) -> None:
    assert Key.of({**_SPEC, **change}) == key


def test_a_start_gets_the_template_of_its_module_and_nobody_elses(pool: _Pool) -> None:
    (shim,) = pool.many(_key(), 1)
    assert pool.start(_key("others")).shim is not shim
    assert pool.start(None).shim is not shim
    assert pool.start(_key()).shim is shim


def test_a_module_that_is_unfit_is_not_tried_again(pool: _Pool) -> None:
    shim = pool.end(pool.start(_key()), unfit=True)
    assert shim.key is None
    assert pool.shims.key_of(_SPEC) is None
    assert pool.shims.key_of({**_SPEC, "task": {"module": "others"}}) == _key("others")


def test_the_next_best_is_what_is_imported_ahead(pool: _Pool) -> None:
    spec = {**_SPEC, "preload": ["json"]}
    best = pool.shims.key_of(spec)
    assert best is not None
    pool.end(pool.start(best), unfit=True)
    next_best = pool.shims.key_of(spec)
    assert next_best == best._replace(module="")
    pool.end(pool.start(next_best), unfit=True)
    assert pool.shims.key_of(spec) is None


def test_a_template_made_before_it_is_wanted_is_taken_by_whom_it_fits(pool: _Pool) -> None:
    pool.shims.make_template(_key(), 60.0)
    made = next(child for child in pool.children if child.key == _key())
    assert made.shim is not None
    pool.shims.make_template(_key(), 60.0)
    assert [child.key for child in pool.children] == [_key(), None]  # once is enough; and one that can become anything
    assert pool.start(_key("others")) is not made
    assert pool.start(_key()) is made


def test_a_shim_that_has_not_reported_is_let_go(pool: _Pool) -> None:
    child = pool.start(None)
    shim = child.shim
    assert shim is not None
    child.finish({})
    assert shim.lost


def test_a_spare_whose_process_has_hung_up_already_is_not_taken(pool: _Pool) -> None:
    """Its shim has not said yet that it ended: a start must not be confused with that."""
    (spare,) = pool.children
    _, descriptors = files.receive(pool.forks.kept[0], 64)
    for fd in descriptors:
        os.close(fd)
    pool.turn()
    child = pool.start(None)
    assert child is not spare
    pool.forks.kept[0].sendall(b'{"cause": "exit", "signal": 9}\n')
    pool.turn()
    assert (spare.alive, child.alive) == (False, True)


def test_only_the_templates_used_last_are_kept(pool: _Pool) -> None:
    shims = pool.many(_key(), 6)
    assert [shim.lost for shim in shims] == [True, True, False, False, False, False]


def test_all_templates_but_one_go_after_a_while(pool: _Pool) -> None:
    shims = pool.many(_key(), 3)
    pool.shims.keep_ready()
    assert pool.shims.drop_at is not None
    pool.shims.drop_idle(time.monotonic())
    assert not any(shim.lost for shim in shims)
    pool.shims.drop_idle(time.monotonic() + 60)
    assert [shim.lost for shim in shims] == [True, True, False]
    assert pool.shims.drop_at is None
