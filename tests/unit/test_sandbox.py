"""Sandboxes and images: what is recorded and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helmr import Image, ProjectError, Sandbox, registry
from helmr.sandbox import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 1024**2),
        ("4GiB", 4 * 1024**3),
        ("1.5 GiB", 3 * 1024**3 // 2),
        ("2gb", 2 * 1000**3),
        ("1TiB", 1024**4),
        ("64KiB", 65536),
        (123, 123),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "4G", "GiB", "-1GiB", "1 000 MiB", 0, -5, True, None, "0MiB"])
def test_other_sizes_are_refused(text: Any) -> None:
    with pytest.raises(ProjectError, match=r"test_sandbox\.py:\d+: memory"):
        parse_size(text, what="memory")


def test_defaults() -> None:
    box = Sandbox("plain")
    assert (box.cpu, box.memory, box.pids, box.disk) == (2.0, 2 * 1024**3, 512, 10 * 1024**3)
    assert (box.workspace, box.network, box.image) == ("/workspace", "internet", Image("python:3.12-slim"))
    assert registry.sandboxes["plain"] is box
    assert box.location.file == __file__


def test_modules_can_be_imported_ahead() -> None:
    assert Sandbox("plain").preload == ()
    assert Sandbox("heavy", preload=["pandas", "lib.tools", "pandas"]).preload == ("pandas", "lib.tools")


@pytest.mark.parametrize("preload", ["pandas", 3, ["a-b"], ["a..b"], [""], ["import"], [1], ["x"] * 65])
def test_what_is_no_module_cannot_be_imported_ahead(preload: Any) -> None:
    with pytest.raises(ProjectError, match=r"test_sandbox\.py:\d+: preload"):
        Sandbox("heavy", preload=preload)


def test_everything_can_be_said() -> None:
    box = Sandbox(
        "full",
        image="debian:12",
        cpu=0.5,
        memory="1GiB",
        workspace="/work/",
        network=["api.example.com", "*.example.org"],
        disk="1GiB",
        pids=64,
    )
    assert box.image == Image("debian:12")
    assert (box.workspace, box.network) == ("/work", ("api.example.com", "*.example.org"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cpu": 0}, "cpu"),
        ({"cpu": 5000}, "cpu"),
        ({"memory": "1MiB"}, "memory is less than 64 MiB"),
        ({"pids": 1}, "pids"),
        ({"workspace": "work"}, "absolute"),
        ({"workspace": "/"}, "absolute"),
        ({"workspace": "/a/../b"}, "absolute"),
        ({"workspace": "/etc/x"}, "folder of the system"),
        ({"workspace": "/tmp"}, "folder of the system"),
        ({"network": "lan"}, "network policy"),
        ({"network": []}, "network policy"),
        ({"network": ["not a host"]}, "network policy"),
        ({"image": ""}, "is not an image name"),
        ({"image": "a b"}, "is not an image name"),
    ],
)
def test_values_are_checked(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ProjectError, match=why):
        Sandbox("bad", **options)
    assert "bad" not in registry.sandboxes


def test_the_same_sandbox_twice_is_one() -> None:
    assert Sandbox("box", memory="2GiB") == Sandbox("box", memory=2 * 1024**3)


def test_two_different_sandboxes_of_one_name_are_refused_naming_both_places() -> None:
    Sandbox("box")
    with pytest.raises(ProjectError, match="sandbox 'box' is defined in two ways") as refused:
        Sandbox("box", cpu=4)
    first, second = refused.value.details["locations"]
    assert first.startswith(__file__)
    assert second.startswith(__file__)
    assert first != second


def test_image_steps_are_recorded_in_order() -> None:
    base = Image()
    image = (
        base.apt("git", "curl")
        .pip("httpx>=0.28", "rich")
        .run("make install")
        .copy("assets", "/opt/assets")
        .env(LANG="C.UTF-8", MODE="a b")
        .workdir("/opt")
        .user("1000:1000")
    )
    assert image.base == "python:3.12-slim"
    assert image.steps == (
        ("apt", "git", "curl"),
        ("pip", "httpx>=0.28", "rich"),
        ("run", "make install"),
        ("copy", "assets", "/opt/assets"),
        ("env", "LANG=C.UTF-8", "MODE=a b"),
        ("workdir", "/opt"),
        ("user", "1000:1000"),
    )
    assert base.steps == ()


@pytest.mark.parametrize(
    "step",
    [
        lambda image: image.apt(),
        lambda image: image.apt("git curl"),
        lambda image: image.apt("-y"),
        lambda image: image.pip(),
        lambda image: image.pip(" "),
        lambda image: image.run(""),
        lambda image: image.run(["make"]),
        lambda image: image.copy("../secrets", "/x"),
        lambda image: image.copy("/etc/passwd", "/x"),
        lambda image: image.copy("x", ""),
        lambda image: image.env(),
        lambda image: image.env(A="two\nlines"),
        lambda image: image.env(A=1),
        lambda image: image.env(**{"A B": "1"}),
        lambda image: image.workdir("a\nb"),
        lambda image: image.user(""),
    ],
)
def test_steps_are_checked(step: Callable[[Image], Image]) -> None:
    with pytest.raises(ProjectError, match=r"test_sandbox\.py:\d+: "):
        step(Image())
