"""Whose a machine is, on disk: taken over by one worker, once, and only from the dead."""

from __future__ import annotations

from pathlib import Path

from worker import machine_record
from worker.machine_record import MachineRecord, held, read, records, seize, write

_RECORD = MachineRecord(worker="wrk_a", workspace_id="ws_1", claim=3, network=("example.com",))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, _RECORD)
    assert read(tmp_path) == _RECORD
    assert records(tmp_path.parent)[tmp_path.name] == _RECORD


def test_what_cannot_be_read_is_no_record(tmp_path: Path) -> None:
    assert read(tmp_path / "gone") is None
    (tmp_path / machine_record._NAME).write_text("{")
    assert read(tmp_path) is None
    assert seize(tmp_path, "wrk_b", set()) is None


def test_a_dead_workers_machine_goes_to_the_first_who_comes(tmp_path: Path) -> None:
    write(tmp_path, _RECORD)
    assert seize(tmp_path, "wrk_b", {"wrk_a", "wrk_b"}) is None
    assert seize(tmp_path, "wrk_b", {"wrk_b"}) == _RECORD
    assert seize(tmp_path, "wrk_c", {"wrk_b", "wrk_c"}) is None
    found = read(tmp_path)
    assert found is not None
    assert (found.worker, found.claim) == ("wrk_b", 3)


def test_a_machine_that_is_nobodys_is_left(tmp_path: Path) -> None:
    write(tmp_path, MachineRecord(worker="wrk_a", workspace_id="", claim=0, network="none"))
    assert seize(tmp_path, "wrk_b", {"wrk_b"}) is None


def test_only_one_at_a_time_takes_or_removes(tmp_path: Path) -> None:
    write(tmp_path, _RECORD)
    with held(tmp_path) as alone:
        assert alone
        assert seize(tmp_path, "wrk_b", {"wrk_b"}) is None
    assert seize(tmp_path, "wrk_b", {"wrk_b"}) == _RECORD
    with held(tmp_path / "gone") as alone:
        assert not alone
