"""Image definitions: what the builder is given, when the result counts as the same, and which base is used."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helmr.errors import HelmrError, ImageError, NotFound
from worker import base_image
from worker.base_tree import Tree, merged
from worker.docker_api import EngineSilent
from worker.docker_build import LOG_LINES, BuildLog
from worker.dockerfile import content_hash, context, context_files, dockerfile
from worker.engine import ImageSpec
from worker.host import host_id
from worker.images import Images

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("step", "line"),
    [
        (("run", "echo $HOME && ls"), 'RUN ["/bin/sh", "-c", "echo $HOME && ls"]'),
        (("run", "a\nFROM evil"), 'RUN ["/bin/sh", "-c", "a\\nFROM evil"]'),
        (
            ("pip", "httpx>=0.28", "six"),
            'RUN ["python3", "-m", "pip", "install", "--no-cache-dir", "httpx>=0.28", "six"]',
        ),
        (("copy", "assets/x", "/opt/x"), 'COPY ["0/x", "/opt/x"]'),
        (("copy", ".", "/opt"), 'COPY ["0/all", "/opt"]'),
        (("env", "A=1"), 'ENV A="1"'),
        (("env", 'A=say "hi" to $USER\\'), 'ENV A="say \\"hi\\" to \\$USER\\\\"'),
        (("workdir", "/opt/x"), "WORKDIR /opt/x"),
        (("user", "task"), "USER task"),
    ],
)
def test_a_step_becomes_one_line(step: tuple[str, ...], line: str) -> None:
    assert dockerfile(ImageSpec(steps=(step,)), "some:base") == f"FROM some:base\n{line}\n"


def test_apt_installs_and_leaves_no_lists() -> None:
    text = dockerfile(ImageSpec(steps=(("apt", "git", "jq"),)), "base")
    assert "apt-get install -y --no-install-recommends git jq && rm -rf /var/lib/apt/lists/*" in text


@pytest.mark.parametrize(
    "step",
    [
        ("frobnicate", "x"),
        ("run",),
        ("copy", "only-source"),
        ("env", "NO_VALUE"),
        ("env", "1BAD=x"),
        ("env", "A=line\nbreak"),
        ("workdir", "/a\nRUN evil"),
        ("user", "root\nRUN evil"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step: tuple[str, ...]) -> None:
    with pytest.raises(ImageError):
        dockerfile(ImageSpec(steps=(step,)), "base")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "assets/deep").mkdir(parents=True)
    (tmp_path / "assets/a.txt").write_text("a")
    (tmp_path / "assets/deep/run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "assets/link").symlink_to("a.txt")
    return tmp_path


def _spec(project: Path, source: str = "assets") -> ImageSpec:
    return ImageSpec(steps=(("copy", source, "/opt/x"),), context=project)


def test_the_context_holds_the_copied_files_and_nothing_of_this_machine(project: Path) -> None:
    spec = _spec(project)
    with tarfile.open(fileobj=io.BytesIO(context("FROM x\n", context_files(spec)))) as archive:
        members = {member.name: member for member in archive}
    assert set(members) == {
        "Dockerfile",
        "0/assets",
        "0/assets/a.txt",
        "0/assets/deep",
        "0/assets/deep/run.sh",
        "0/assets/link",
    }
    assert members["0/assets/link"].linkname == "a.txt"
    assert {(member.uid, member.mtime, member.uname) for member in members.values()} == {(0, 0, "")}


def _rewrite(project: Path) -> None:
    (project / "assets/a.txt").write_text("b")


def _rename(project: Path) -> None:
    (project / "assets/a.txt").rename(project / "assets/b.txt")


def _make_executable(project: Path) -> None:
    (project / "assets/deep/run.sh").chmod(0o755)


def _touch(project: Path) -> None:
    os.utime(project / "assets/a.txt", (1, 1))


def _change_umask(project: Path) -> None:
    (project / "assets/a.txt").chmod(0o600)


@pytest.mark.parametrize(
    ("change", "same"),
    [(_rewrite, False), (_rename, False), (_make_executable, False), (_touch, True), (_change_umask, True)],
)
def test_the_hash_follows_names_bytes_and_executability(
    project: Path, change: Callable[[Path], None], same: bool
) -> None:
    before = content_hash("FROM x", "sha256:1", context_files(_spec(project)))
    change(project)
    assert (content_hash("FROM x", "sha256:1", context_files(_spec(project))) == before) is same


def test_the_hash_follows_the_base_and_the_steps() -> None:
    assert len({content_hash(text, base, []) for text in ("FROM x", "FROM y") for base in ("1", "2")}) == 4


@pytest.mark.parametrize("source", ["missing.txt", "../outside", "/etc/passwd"])
def test_only_files_of_the_project_are_copied(project: Path, source: str) -> None:
    with pytest.raises(ImageError, match="cannot copy"):
        context_files(_spec(project, source))


def test_a_link_out_of_the_project_is_not_followed(project: Path) -> None:
    (project / "leak").symlink_to("/etc")
    with pytest.raises(ImageError, match="outside"):
        context_files(_spec(project, "leak"))


def test_copying_needs_a_project() -> None:
    with pytest.raises(ImageError, match="without a task project"):
        context_files(ImageSpec(steps=(("copy", "a", "/a"),)))


@pytest.mark.parametrize(
    ("base", "covered"),
    [
        ("python:3.12-slim", True),
        ("python:3", True),
        ("python", True),
        ("docker.io/library/python:3.13.1-slim-bookworm", True),
        ("python:3.12-alpine", False),
        ("python:2.7", False),
        ("debian:12", False),
        ("acme/python:3.12", False),
    ],
)
def test_the_stand_in_serves_for_python_alone(base: str, covered: bool) -> None:
    assert base_image.covers(base) is covered


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("./bin/bash", "usr/bin/bash"),
        ("./lib64/ld.so", "usr/lib64/ld.so"),
        ("/usr/lib/x", "usr/lib/x"),
        ("./", ""),
        (".", ""),
    ],
)
def test_debian_paths_are_merged_into_usr(name: str, place: str) -> None:
    assert merged(name) == place


def test_a_tree_keeps_the_first_of_two_files_and_makes_the_folders_above() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        tree = Tree(archive)
        tree.file("opt/deep/x", b"first", 0o755)
        tree.file("opt/deep/x", b"second")
        tree.system_files()
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        names = archive.getnames()
        first = archive.extractfile("opt/deep/x")
        assert first is not None
        assert first.read() == b"first"
        assert archive.getmember("tmp").mode == 0o1777
        assert archive.getmember("workspace").uid == 1000
    assert len(names) == len(set(names))
    assert names.index("opt") < names.index("opt/deep") < names.index("opt/deep/x")


def test_a_build_log_reports_steps_and_keeps_the_end() -> None:
    steps: list[str] = []
    log = BuildLog(steps.append)
    for item in (
        {"stream": "Step 1/2 : FROM x\n"},
        *({"stream": f"\x1b[91mline {n}\n\x1b[0m"} for n in range(100)),
        {"error": "exit 3"},
    ):
        log(item)
    assert steps == ["Step 1/2 : FROM x"]
    assert log.error == "exit 3"
    assert log.tail.splitlines() == [*(f"line {n}" for n in range(100 - LOG_LINES + 1, 100)), "exit 3"]


def test_the_host_id_is_made_once(tmp_path: Path) -> None:
    first = host_id(tmp_path / "home")
    assert first.startswith("host_")
    assert host_id(tmp_path / "home") == first
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["host-id"]


class _Engine:
    """Stands for DockerApi and the SDK's client at once: some images, and a registry that answers or not."""

    def __init__(self, registry: Exception | None, images: set[str]) -> None:
        self.registry, self.local, self.asked = registry, images, 0

    async def call(self, function: Callable[[Any], Any], *, patience: float = 0) -> Any:  # noqa: ARG002
        return function(self)

    async def stream(self, request: Callable[[Any], Any], each: Callable[[Any], None]) -> None:
        for item in request(self):
            each(item)

    def inspect_image(self, name: str) -> dict[str, Any]:
        if name not in self.local:
            raise NotFound(name)
        return {"Id": name, "Config": {"Labels": {"helmr.base": "1"} if "base" in name else None}}

    def images(self, *, filters: dict[str, str]) -> list[dict[str, Any]]:
        return [{"RepoTags": [name]} for name in self.local if filters and "base" in name]

    def inspect_distribution(self, _: str) -> None:
        self.asked += 1
        if self.registry is not None:
            raise self.registry

    def pull(self, name: str, **_: Any) -> list[dict[str, str]]:
        self.local.add(name)
        return [{"status": "Pulling"}]


def _images(engine: _Engine, home: Path) -> Images:
    return Images(engine, home, "host_test")  # type: ignore[arg-type]


SILENT = HelmrError("the Docker engine refused: Get https://registry/v2/: dial tcp: lookup registry: no such host")
DENIED = HelmrError("the Docker engine refused: pull access denied for nobody/nothing")


async def test_a_local_image_is_used_without_asking_anybody(tmp_path: Path) -> None:
    engine = _Engine(SILENT, {"mine:1"})
    assert await _images(engine, tmp_path).ensure(ImageSpec(base="mine:1"), print) == "mine:1"
    assert engine.asked == 0


async def test_an_image_that_was_there_a_moment_ago_is_not_looked_for_unless_somebody_missed_it(tmp_path: Path) -> None:
    engine = _Engine(None, {"python:3.12-slim"})
    images = _images(engine, tmp_path)
    await images.ensure(ImageSpec(), print)
    engine.local.clear()
    assert await images.ensure(ImageSpec(), print) == "python:3.12-slim"
    assert engine.local == set()
    images.forget()
    assert await images.ensure(ImageSpec(), print) == "python:3.12-slim"
    assert engine.local == {"python:3.12-slim"}


async def test_an_image_that_a_registry_has_is_pulled(tmp_path: Path) -> None:
    engine = _Engine(None, set())
    assert await _images(engine, tmp_path).ensure(ImageSpec(), print) == "python:3.12-slim"


@pytest.mark.parametrize("silence", [SILENT, EngineSilent("the Docker engine does not answer")])
async def test_without_a_registry_python_gets_the_stand_in_and_the_registry_is_asked_once(
    tmp_path: Path, silence: HelmrError
) -> None:
    engine = _Engine(silence, {base_image.tag()})
    images = _images(engine, tmp_path)
    assert [await images.ensure(ImageSpec(), print) for _ in range(3)] == [base_image.tag()] * 3
    assert engine.asked == 1


async def test_a_stand_in_that_another_machine_made_is_used_too(tmp_path: Path) -> None:
    engine = _Engine(SILENT, {"helmr/base:elsewhere-r1"})
    assert await _images(engine, tmp_path).ensure(ImageSpec(), print) == "helmr/base:elsewhere-r1"


async def test_without_a_registry_no_other_image_is_faked(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no registry answers") as caught:
        await _images(_Engine(SILENT, {base_image.tag()}), tmp_path).ensure(ImageSpec(base="alpine:3"), print)
    assert "docker load" in str(caught.value.hint)


async def test_a_registry_that_says_no_is_believed(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="pull access denied"):
        await _images(_Engine(DENIED, {base_image.tag()}), tmp_path).ensure(ImageSpec(), print)


async def test_apt_steps_on_the_stand_in_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no apt"):
        await _images(_Engine(SILENT, {base_image.tag()}), tmp_path).ensure(ImageSpec(steps=(("apt", "git"),)), print)
