"""Where the keys of secrets come from, and how one follows another."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from bus.keyring import FILE_NAME, KeyRing
from helmr.errors import ConfigError

ONE, TWO = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))


def test_a_home_gets_its_key_when_the_first_secret_needs_one(tmp_path: Path) -> None:
    ring = KeyRing.find(tmp_path)
    assert ring.known() == ()
    key = ring.make()
    path = tmp_path / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.id for each in KeyRing.find(tmp_path).known()] == [key.id]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_key_comes_first_and_the_old_one_can_be_forgotten(tmp_path: Path) -> None:
    ring = KeyRing.find(tmp_path)
    old, new = ring.make(), ring.make()
    assert list(ring.known()) == [new, old]
    assert ring.find_key(old.id) == old
    ring.retire()
    assert list(KeyRing.find(tmp_path).known()) == [new]
    assert ring.find_key(old.id) is None


def test_keys_that_are_given_are_not_ours_to_change(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{ONE}\n{TWO}\n")
    for ring in (KeyRing.find(tmp_path, text=f"{ONE},{TWO}"), KeyRing.find(tmp_path, file=file)):
        assert [key.raw[0] for key in ring.known()] == [1, 2]
        with pytest.raises(ConfigError, match="are given to it"):
            ring.make()


def test_a_key_that_was_added_to_the_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ONE)
    ring = KeyRing.find(tmp_path, file=file)
    key = KeyRing.find(tmp_path, text=TWO).known()[0]
    assert ring.find_key(key.id) is None
    file.write_text(f"{TWO}\n{ONE}")
    assert ring.find_key(key.id) == key


@pytest.mark.parametrize("text", ["", "short", base64.b64encode(b"x" * 31).decode(), f"{ONE} nonsense!"])
def test_what_is_no_key_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HELMR_SECRET_KEY holds"):
        KeyRing.find(tmp_path, text=text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no secret key in"):
        KeyRing.find(tmp_path, file=tmp_path / "none")


def test_a_key_does_not_show_itself(tmp_path: Path) -> None:
    key = KeyRing.find(tmp_path, text=ONE).known()[0]
    assert repr(key) == f"Key({key.id!r})"
