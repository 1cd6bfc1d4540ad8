"""The project that ``helmr init`` writes runs as it stands, and overwrites nothing."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from helmr import Conflict
from helmr.config import load
from helmr.project import Rules
from helmr.runtime import recording
from helmr.scaffold import project_name, write_project


def test_the_project_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My Agents"
    written = write_project(folder)
    assert [path.name for path in written] == ["helmr.toml", "tasks.py", ".helmrignore"]
    settings = load(folder, environ={"HOME": str(tmp_path)})
    assert (settings.project, settings.modules, settings.root) == ("my-agents", ("tasks",), folder)
    assert Rules(folder).names() == ["helmr.toml", "tasks.py"]
    monkeypatch.chdir(tmp_path)
    hello = runpy.run_path(str(folder / "tasks.py"))
    with recording(workspace=tmp_path) as said:
        assert hello["hello"](hello["Greeting"](name="{Ada}"), said.context) == {"greeting": "Hello, {Ada}!"}
    assert (tmp_path / "hello.txt").read_text() == "Hello, {Ada}!\n"
    assert said.metadata == {"phase": "done"}


@pytest.mark.parametrize("there", ["helmr.toml", "tasks.py", ".helmrignore", "tasks/x.py"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    with pytest.raises(Conflict, match=there.partition("/")[0]):
        write_project(tmp_path, "p")
    assert (tmp_path / there).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("folder", "name"),
    [("/a/Agents_2", "agents-2"), ("/a/--x--", "x"), ("/", "tasks"), ("/ü", "tasks"), (f"/{80 * 'x'}", 63 * "x")],
)
def test_a_name_is_made_from_the_folder(folder: str, name: str) -> None:
    assert project_name(Path(folder)) == name
