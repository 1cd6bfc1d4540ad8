"""A running Helmr under fire keeps its promises; and where a protection is taken away, that is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
_ROOT = Path(__file__).parents[2]
#: Set to try every mutation, half a minute each, and containers.
_LONG = "HELMR_CHAOS_LONG"

#: For each mutation: what must go wrong for the protection to be needed, and the rule that is then broken.
_MUTATIONS = {
    "fence": (["2 pause worker-1 8", "2.5 pause worker-3 8"], "only the holder writes"),
    "ttl-cancel": ([], "a leased run has no time to live"),
    "admission": ([], "limits hold"),
    "log-chunks": ([], "logs are whole"),
}


def _chaos(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=_ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_no_rule_is_broken_under_fire(tmp_path: Path) -> None:
    code, said = _chaos(tmp_path, "--seed", "1", "--seconds", "45")
    assert code == 0, said
    assert "0 violations" in said


@pytest.mark.docker
@pytest.mark.skipif(_LONG not in os.environ, reason=f"more than a minute, and needs root: set {_LONG}")
def test_nor_where_containers_and_their_engine_are_broken(tmp_path: Path) -> None:
    code, said = _chaos(tmp_path, "--engine", "docker", "--seed", "4", "--seconds", "45")
    assert code == 0, said
    assert "0 violations" in said


@pytest.mark.skipif(_LONG not in os.environ, reason=f"half a minute each: set {_LONG}")
@pytest.mark.parametrize("mutation", _MUTATIONS)
def test_the_loss_of_a_protection_is_noticed(tmp_path: Path, mutation: str) -> None:
    faults, rule = _MUTATIONS[mutation]
    plan = [word for fault in faults for word in ("--fault", fault)] or ["--faults", ""]
    code, said = _chaos(tmp_path, "--seed", "1", "--seconds", "12", "--mutation", mutation, *plan)
    assert code == 1, said
    assert f"VIOLATION {rule}" in said
