"""Which capabilities a process has, read as the kernel tells them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker import file_rights


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        ("000001ffffffffff", []),
        ("000000000000000b", []),
        ("0000000000000000", ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]),
        ("000001fffffffffd", ["CAP_DAC_OVERRIDE"]),
    ],
    ids=["root", "given", "nobody", "root, less one"],
)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effective: str, missing: list[str]
) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t{effective}\nCapBnd:\t000001ffffffffff\n")
    monkeypatch.setattr(file_rights, "_STATUS", status)
    assert file_rights.missing() == missing


@pytest.mark.parametrize(("user", "lacks"), [(0, False), (1000, True)])
def test_without_the_kernel_s_word_the_user_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, lacks: bool
) -> None:
    monkeypatch.setattr(file_rights, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert bool(file_rights.missing()) is lacks
