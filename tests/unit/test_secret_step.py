"""Steps of an image that are given secrets: what makes them the same, what the shell reads, what is refused."""

from __future__ import annotations

import subprocess

import pytest

from helmr import Image, Secret
from helmr.errors import ImageError, ProjectError
from worker.dockerfile import parts
from worker.secret_step import SecretStep, _config, _lines

AWKWARD = ["plain", " spaces  ", "two\nlines\n", "back\\slash\\n", "%s %b $HOME `id` \"'", "ünï", "\ttab\r"]


@pytest.mark.parametrize("value", AWKWARD)
def test_the_command_gets_every_value_as_it_is(value: str) -> None:
    step = SecretStep(command='printf %s "$FIRST|$SECOND"; cat', variables={"FIRST": "a", "SECOND": "b"})
    done = subprocess.run(
        ["/bin/sh", "-c", step.script, step.command],
        input=step.input({"a": value, "b": "last"}),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.decode() == f"{value}|last"


def test_input_that_breaks_off_starts_no_command() -> None:
    step = SecretStep(command="echo ran", variables={"FIRST": "a", "SECOND": "b"})
    done = subprocess.run(
        ["/bin/sh", "-c", step.script, step.command], input=b"one\n", capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (125, b"")


def test_images_record_commands_and_names() -> None:
    image = Image().run("make").run("pip install x", secrets=[Secret("pip-token", env="TOKEN"), Secret("KEY")])
    assert image.steps[1] == ("secret-run", "pip install x", "TOKEN=pip-token", "KEY=KEY")
    assert SecretStep.parse(image.steps[1]).variables == {"TOKEN": "pip-token", "KEY": "KEY"}


@pytest.mark.parametrize("wrong", ["TOKEN", Secret("x", file="/run/x"), Secret("x", env="X", file="/run/x")])
def test_only_variables_can_be_given(wrong: object) -> None:
    with pytest.raises(ProjectError, match="cannot be given"):
        Image().run("true", secrets=[wrong])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "step",
    [
        ("secret-run", "true"),
        ("secret-run", "true", "TOKEN"),
        ("secret-run", "true", "A;id=x"),
        ("secret-run", "x", "PATH=x"),
    ],
)
def test_what_is_no_such_step_is_refused(step: tuple[str, ...]) -> None:
    with pytest.raises(ImageError, match="is not understood"):
        SecretStep.parse(step)


def test_a_step_with_secrets_is_built_apart() -> None:
    plain, secret = ("run", "true"), ("secret-run", "true", "A=a")
    assert list(parts(())) == []
    assert list(parts((plain, plain))) == [(plain, plain)]
    assert list(parts((plain, secret, secret, plain))) == [(plain,), (secret,), (secret,), (plain,)]


def test_the_value_does_not_make_another_image_but_command_and_names_do() -> None:
    def text(command: str, **variables: str) -> str:
        return SecretStep(command=command, variables=variables).text

    assert text("true", A="a", B="b") == text("true", B="b", A="a")
    assert len({text("true", A="a"), text("false", A="a"), text("true", A="b"), text("true", B="a")}) == 4


def test_the_result_is_configured_like_its_base() -> None:
    base = {"User": "task", "Env": ["A=1"], "Cmd": ["python3"], "Entrypoint": None, "Labels": {"x": "1"}}
    config = _config(base, {"helmr.image": "0"})
    assert (config["User"], config["Env"], config["Cmd"], config["Entrypoint"]) == ("task", ["A=1"], ["python3"], [])
    assert config["Labels"] == {"x": "1", "helmr.image": "0", "helmr.install": "", "helmr.kind": ""}


def test_output_is_taken_in_line_by_line() -> None:
    said = [each["stream"] for each in _lines(iter([b"on", b"e\ntwo\nth", b"ree"]), lambda: b"!")]
    assert said == ["one", "two", "three!"]
