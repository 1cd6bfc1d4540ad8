"""Files copied into workspaces and out of them, by the client and on the command line."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from helmr.client import AsyncClient
from helmr.errors import HelmrError, NotFound
from tests.integration.platform import Platform

pytestmark = pytest.mark.anyio

TASKS = """
    from pathlib import Path
    from helmr import task

    @task("names")
    def names() -> list:
        return sorted(str(path) for path in Path().rglob("*") if path.is_file())
"""
_ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "tool").write_bytes(os.urandom(3_000_000))
    (root / "sub" / "tool").chmod(0o755)
    (root / "sub" / "link").symlink_to("tool")
    (root / "left.log").write_text("left")
    (root / ".gitignore").write_text("*.log\n")
    return root


async def test_a_tree_goes_in_and_comes_back(helmr: AsyncClient, tree: Path, tmp_path: Path) -> None:
    workspace = await helmr.workspaces.create(task="names")
    assert await helmr.workspaces.upload(workspace, tree) == []
    assert await helmr.workspaces.upload(workspace, f"{tree}/.", "flat") == []
    run = await (await helmr.sessions.start("names", workspace=workspace.id)).run.wait(timeout=60)
    names = [".gitignore", "sub/link", "sub/tool"]
    assert run.output == sorted([f"{folder}/{name}" for folder in ("flat", "tree") for name in names])
    assert await helmr.workspaces.download(workspace, "tree/sub", tmp_path / "back") == []
    assert (tmp_path / "back" / "tool").read_bytes() == (tree / "sub" / "tool").read_bytes()
    assert (tmp_path / "back" / "tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "back" / "link").readlink() == Path("tool")
    (tmp_path / "here").mkdir()
    await helmr.workspaces.download(workspace, "tree/sub/tool", tmp_path / "here")
    assert (tmp_path / "here" / "tool").stat().st_size == 3_000_000
    versions = await helmr.workspaces.versions(workspace)
    assert len(versions) == 2, "each upload has changed something, and nothing else has"


async def test_what_cannot_be_copied_says_why(helmr: AsyncClient, tree: Path, tmp_path: Path) -> None:
    workspace = await helmr.workspaces.create(task="names")
    with pytest.raises(HelmrError, match="leads out of what is copied"):
        await helmr.workspaces.upload(workspace, tree, "../up")
    with pytest.raises(NotFound, match="there is no"):
        await helmr.workspaces.upload(workspace, tmp_path / "missing")
    with pytest.raises(HelmrError, match="there is no"):
        await helmr.workspaces.download(workspace, "missing", tmp_path / "x")
    with pytest.raises(NotFound, match="there is no folder"):
        await helmr.workspaces.download(workspace, "missing", tmp_path / "no" / "folder")
    await helmr.workspaces.upload(workspace, tree)
    (tmp_path / "here" / "tool").mkdir(parents=True)
    with pytest.raises(HelmrError, match="it is a folder"):
        await helmr.workspaces.download(workspace, "tree/sub/tool", tmp_path / "here")
    with pytest.raises(NotFound, match="no sandbox"):
        await helmr.workspaces.create(sandbox="none")


async def test_links_out_of_a_hostile_tree_stay_there(helmr: AsyncClient, tmp_path: Path) -> None:
    workspace = await helmr.workspaces.create(sandbox="default")
    await helmr.workspaces.exec(workspace, ["sh", "-c", "mkdir t; ln -s /etc/passwd t/out; echo x > t/in"])
    left_out = await helmr.workspaces.download(workspace, "t", tmp_path)
    assert left_out == ["the link out -> /etc/passwd leads out of what is copied"]
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["in"]


async def _helmr(platform: Platform, helmr: AsyncClient, *words: str, cwd: Path) -> tuple[bytes, bytes, int | None]:
    project = {"HELMR_PROJECT": helmr.scope.project, "HELMR_ENV": helmr.scope.environment}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, **project, "HELMR_URL": platform.server.url, "PYTHONPATH": str(_ROOT)},
    )
    async with asyncio.timeout(60):
        stdout, stderr = await process.communicate()
    return stdout, stderr, process.returncode


async def test_on_the_command_line(platform: Platform, helmr: AsyncClient, tree: Path) -> None:
    words = ("session", "start", "names", "--upload", ".", "--upload", "sub/tool:bin/", "--wait")
    stdout, stderr, code = await _helmr(platform, helmr, *words, cwd=tree)
    assert (stdout, code) == (b'[".gitignore","bin/tool","sub/link","sub/tool"]\n', 0), stderr
    words = ("workspace", "create", "--task", "names", "--tag", "mine", "--metadata-json", '{"owner": "ada"}')
    workspace = (await _helmr(platform, helmr, *words, cwd=tree))[0].decode().strip()
    made = await helmr.workspaces.get(workspace)
    assert (made.tags, made.metadata) == (("mine",), {"owner": "ada"})
    for upload, said in (("missing", b"there is no missing"), (".:../up", b"leads out of what is copied")):
        _, stderr, _ = await _helmr(platform, helmr, "session", "start", "names", "--upload", upload, cwd=tree)
        assert said in stderr
        assert b"stays" not in stderr, "what was made for a start that did not come about is deleted"
    assert (await _helmr(platform, helmr, "workspace", "cp", "--all", ".", f"{workspace}:all", cwd=tree))[2] == 0
    assert (await _helmr(platform, helmr, "workspace", "cp", f"{workspace}:all/left.log", "back", cwd=tree))[2] == 0
    assert (tree / "back").read_text() == "left"
    _, stderr, code = await _helmr(platform, helmr, "workspace", "cp", "a", "b", cwd=tree)
    assert (code, b"one of the two" in stderr) == (2, True)
    _, stderr, code = await _helmr(platform, helmr, "workspace", "cp", f"{workspace}:all/left.log", "-", cwd=tree)
    assert (code, b"helmr workspace files cat" in stderr) == (2, True)
