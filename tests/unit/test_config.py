"""Settings: where each comes from, who wins, and what is refused."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from helmr import ConfigError
from helmr.config import Settings, ensure_home, load
from helmr.index import RetentionEntry


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A task project with a sub-folder, in a home without a user file."""
    folder = tmp_path / "project"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "helmr.toml").write_text('project = "agents"\nenv = "staging"\nmodules = ["jobs"]\nignore = ["*.csv"]\n')
    return folder


def settings(start: Path, environ: dict[str, str] | None = None, **flags: Any) -> Settings:
    return load(start, environ={"HOME": str(start.anchor), **(environ or {})}, **flags)


def test_the_file_is_found_from_below(project: Path) -> None:
    found = settings(project / "deep" / "er")
    assert found.root == project
    assert (found.project, found.env, found.modules, found.ignore) == ("agents", "staging", ("jobs",), ("*.csv",))
    assert (found.url, found.api_key) == (None, None)


def test_defaults(tmp_path: Path) -> None:
    (tmp_path / "helmr.toml").write_text('project = "p"\n')
    found = settings(tmp_path, {"HOME": "/home/ada"})
    assert (found.env, found.modules, found.ignore) == ("dev", ("tasks",), ())
    assert found.home == Path("/home/ada/.local/state/helmr")


def test_what_is_kept_is_said_in_days(tmp_path: Path) -> None:
    (tmp_path / "helmr.toml").write_text('project = "p"\nkeep_logs = "14d"\nkeep_events = "forever"\n')
    assert settings(tmp_path).retention == RetentionEntry(keep_logs=14, keep_events="forever")


def test_pyproject_will_do(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.helmr]\nproject = "from-pyproject"\n')
    assert settings(tmp_path).project == "from-pyproject"
    (tmp_path / "helmr.toml").write_text('project = "from-helmr"\n')
    assert settings(tmp_path).project == "from-helmr"


def test_a_pyproject_without_the_table_is_passed_over(project: Path) -> None:
    (project / "deep" / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert settings(project / "deep").root == project


def test_precedence(project: Path, tmp_path: Path) -> None:
    user = tmp_path / "config" / "helmr" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text('project = "user"\nenv = "user"\nurl = "nats://user:1"\nhome = "/user"\napi_key = "user-key"\n')
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert settings(tmp_path, environ).project == "user"
    assert settings(tmp_path, environ).api_key == "user-key"
    assert settings(project, environ).project == "agents"
    assert settings(project, environ).url == "nats://user:1"
    assert settings(project, environ).home == Path("/user")
    environ |= {
        "HELMR_PROJECT": "env-project",
        "HELMR_ENV": "env-env",
        "HELMR_URL": "nats://env:2",
        "HELMR_HOME": "/env",
    }
    found = settings(project, environ)
    assert (found.project, found.env, found.url, found.home) == ("env-project", "env-env", "nats://env:2", Path("/env"))
    found = settings(project, environ, project="flag", env="f", url="tls://flag:3", home=Path("/flag"), api_key="k")
    assert (found.project, found.env, found.url, found.home) == ("flag", "f", "tls://flag:3", Path("/flag"))
    assert found.api_key == "k"


def test_an_empty_variable_counts_as_unset(project: Path) -> None:
    assert settings(project, {"HELMR_PROJECT": "", "HELMR_URL": ""}).project == "agents"


def test_state_folder_of_the_desktop_specification(project: Path) -> None:
    assert settings(project, {"XDG_STATE_HOME": "/state"}).home == Path("/state/helmr")
    assert settings(project, {"XDG_STATE_HOME": "relative", "HOME": "/h"}).home == Path("/h/.local/state/helmr")


def test_outside_of_any_project(tmp_path: Path) -> None:
    found = settings(tmp_path)
    assert (found.root, found.project) == (None, None)
    for require in (found.require_project, found.require_root):
        with pytest.raises(ConfigError, match=r"no helmr\.toml") as refused:
            require()
        assert "helmr init" in (refused.value.hint or "")


def test_the_key_is_not_shown(project: Path) -> None:
    assert "geheim" not in repr(settings(project, api_key="geheim"))


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ('projet = "x"', "unknown setting 'projet'", "did you mean 'project'?"),
        ('project = "p"\nzzz = 1', "unknown setting 'zzz'", "known are"),
        ('env = "dev"', "project is missing", "add a line"),
        ('project = "Agents"', "'Agents' is not a name", "lower-case"),
        ('project = "a.b"', "'a.b' is not a name", "lower-case"),
        (f'project = "{"x" * 64}"', "is not a name", "63"),
        ("project = 5", "5 is not a name", "lower-case"),
        ('project = "p"\nenv = ""', "'' is not a name", "lower-case"),
        ('project = "p"\nmodules = "tasks"', "'tasks' is not a list", '["tasks"]'),
        ('project = "p"\nmodules = []', "is not a list", '["tasks"]'),
        ('project = "p"\nignore = [1]', "is not a list", "tasks"),
        ('project = "p"\nkeep_logs = 30', "keep_logs: 30 is not a duration", "forever"),
        ('project = "p"\nkeep_logs = "soon"', "'soon' is not a duration", "30d"),
        ('project = "p"\nkeep_events = "36h"', "36h is not a number of whole days", "30d"),
        ('project = "p"\nkeep_events = "0d"', "0d is not a number of whole days", "30d"),
        ('project = "p"\nurl = "http://x"', "is not the URL of a NATS server", "nats://"),
        ('project = "p"\nurl = "nats://[x"', "is not the URL of a NATS server", "nats://"),
        ('project = "p"\napi_key = "k"', "api_key does not belong", "HELMR_API_KEY"),
        ("project = \n", r"not valid TOML: .*line 1", None),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, why: str, hint: str | None) -> None:
    (tmp_path / "helmr.toml").write_text(text)
    with pytest.raises(ConfigError, match=why) as refused:
        settings(tmp_path)
    assert str(tmp_path / "helmr.toml") in refused.value.message
    assert hint is None or hint in (refused.value.hint or "")


def test_mistakes_elsewhere_name_their_origin(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"HELMR_ENV: 'No' is not a name"):
        settings(project, {"HELMR_ENV": "No"})
    with pytest.raises(ConfigError, match=r"--url: 'x' is not the URL"):
        settings(project, url="x")
    (project / "helmr.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not valid TOML"):
        settings(project)


def test_home_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    home = ensure_home(tmp_path / "a" / "b")
    assert home.stat().st_mode & 0o777 == 0o700
    assert list(ensure_home(home).iterdir()) == []


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for home, why in ((file, "it is a file"), (file / "below", "a part of its path is a file")):
        with pytest.raises(ConfigError, match=why) as refused:
            ensure_home(home)
        assert "HELMR_HOME" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("number", "why", "hint"),
    [
        (errno.EROFS, "the file system is read-only", "write to"),
        (errno.EACCES, "permission denied", "write to"),
        (errno.ENOSPC, "no space is left", "free some space"),
        (errno.EDQUOT, "the disk quota is used up", "free some space"),
        (errno.EIO, "Input/output error", "write to"),
    ],
)
def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, why: str, hint: str
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=why) as refused:
        ensure_home(tmp_path)
    assert hint in (refused.value.hint or "")
