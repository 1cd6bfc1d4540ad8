"""Where a secret may be put, and where not."""

from __future__ import annotations

from typing import Any

import pytest

from bus.services.deployments import check_secrets
from bus.services.secrets import ReleaseReply, SetRequest, check_value
from helmr import ProjectError, Secret
from helmr.errors import TooLarge, UsageError
from worker.engine import ProcessSpec, SecretFile
from worker.run_secrets import place


@pytest.mark.parametrize("env", ["OPENAI_API_KEY", "token", "_X1", "PATHS", "ENVIRONMENT"])
def test_variables_of_ones_own_are_fine(env: str) -> None:
    assert Secret("name", env=env).env == env


@pytest.mark.parametrize(
    "env",
    [
        *("LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "HOME", "HELMR_API_KEY", "BASH_ENV"),
        *("ld_preload", "NODE_OPTIONS", "A=B", "A B", "1A", "", "A\0"),
    ],
)
def test_variables_that_change_what_is_loaded_are_refused(env: str) -> None:
    with pytest.raises(ProjectError, match="cannot be put there"):
        Secret("name", env=env)
    with pytest.raises(UsageError, match="task t: secret 'name'"):
        check_secrets({"tasks": [{"id": "t", "secrets": [{"name": "name", "env": env}]}]})


@pytest.mark.parametrize(
    ("file", "mode"),
    [
        *((path, 0o400) for path in ("/run/../etc/passwd", "/run/a/../b", "/run//a", "/run/", "run/x", "/run/x\0")),
        *((path, 0o400) for path in ("/tmp/x", "/helmr/run/socket", "/workspace/x")),
        *(("/run/x", mode) for mode in (0o4755, 0, True, "0400")),
    ],
)
def test_paths_and_modes_that_play_tricks_are_refused(file: str, mode: Any) -> None:
    with pytest.raises(ProjectError, match="cannot be put there"):
        Secret("name", file=file, mode=mode)
    with pytest.raises(UsageError, match="task t: secret 'name'"):
        check_secrets({"tasks": [{"id": "t", "secrets": [{"name": "name", "file": file, "mode": mode}]}]})


def test_a_name_that_could_leave_its_scope_is_refused() -> None:
    with pytest.raises(UsageError, match="that is no name"):
        check_secrets({"tasks": [{"id": "t", "secrets": [{"name": "a.b", "env": "A"}]}]})


def test_values_go_where_they_were_declared_to_go() -> None:
    declared = [{"name": "a", "env": "A"}, {"name": "b", "file": "/run/b", "mode": 0o440}]
    placed = place([*declared, {"name": "a", "env": "A2", "file": "/run/a"}], {"a": "aaaa", "b": "bbbb"})
    assert placed.env == {"A": "aaaa", "A2": "aaaa"}
    files = (SecretFile(path="/run/b", mode=0o440, value="bbbb"), SecretFile(path="/run/a", value="aaaa"))
    assert placed.files == files
    assert placed.masker.text("aaaabbbb") == "******"


def test_nothing_that_holds_a_value_shows_it() -> None:
    value = "s3cr3t-value"
    placed = place([{"name": "a", "env": "A", "file": "/run/a"}], {"a": value})
    spec = ProcessSpec(id="p", secrets=placed.env, secret_files=placed.files)
    for holder in (placed, spec, SetRequest(name="a", value=value), ReleaseReply(values={"a": value})):
        assert value not in repr(holder)


@pytest.mark.parametrize(("value", "error"), [("", UsageError), ("a\0b", UsageError), ("ä" * 32_769, TooLarge)])
def test_values_that_no_variable_can_hold_are_refused(value: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_value(value)
