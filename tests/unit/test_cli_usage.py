"""Whatever is typed wrongly is answered with what was meant, on stderr, with the exit code that the reference names."""

from __future__ import annotations

import os
from pathlib import Path

import click
import nats.errors
import pytest

from cli import main as cli_main
from cli.errors import EXIT_CODES, report
from cli.main import COMMANDS, call, helmr
from cli.options import Command, Flags, Group, flags
from helmr.errors import Conflict, HelmrError, NotAllowed, NotFound, RunFailed, TimedOut, Unavailable, UsageError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No project, no server, no settings of the user."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HELMR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HELMR_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("sttus", "no such command: 'sttus'", "did you mean 'status'?"),
        ("run lgos x", "no such command: 'lgos'", "did you mean 'logs'?"),
        ("run frobnicate", "no such command: 'frobnicate'", "known are list, get, explain, logs, events, wait, cancel"),
        ("run list --stat queued", "no such option '--stat'", "did you mean '--status'?"),
        ("run list --status suceeded", "no such status: 'suceeded'", "did you mean 'succeeded'?"),
        ("worker --engine dokcer", "no such engine: 'dokcer'", "did you mean 'docker'?"),
        ("run list --since soon", "--since 'soon' is not a duration", "write 90s, 15m, 2h, 7d"),
        ("run get", "missing argument 'RUN'", "see helmr run get --help"),
        (
            "dev missing-folder",
            "invalid value for 'DIR': Directory 'missing-folder' does not exist",
            "see helmr dev --help",
        ),
        ("dev", "no task project", "helmr init"),
        ("session start t --payload a", "--payload 'a' is not KEY=VALUE", "e.g. --payload name=Ada"),
        ("session start t --payload-json {", "--payload-json is not JSON", "quote it for the shell"),
        ("session start t --payload-file none.json", "--payload-file none.json: No such file", None),
        (
            "session start t --payload a=1 --payload-json 1",
            "--payload and --payload-json exclude each other",
            "one way",
        ),
        ("session start t --metadata-json 1", "--metadata-json is not an object", "e.g."),
        ("session start t --timeout 5s", "--timeout is for --wait and --follow", "--ttl"),
        ("--project UPPER run list", "--project: 'UPPER' is not a name", "lower-case"),
        ("run list --url http://x", "is not the URL of a NATS server", "nats://127.0.0.1:4222"),
        ("completion tcsh", "no such shell: 'tcsh'", None),
    ],
)
def test_a_wrong_command_line_says_what_was_meant(
    line: str, error: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(line.split()) == 2
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert (out, told[0].startswith("error: ")) == ("", True)
    assert error in told[0]
    assert hint is None or (told[1].startswith("hint: ") and hint in told[1])


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("run list --project p", 4, "no Helmr server runs here"),
        ("run list --project p --url nats://127.0.0.1:9", 4, "no NATS server answers at nats://127.0.0.1:9"),
        ("worker --engine process", 4, "no Helmr server runs here"),
        ("run list", 2, "no project"),
    ],
)
def test_without_a_server_commands_say_so(line: str, code: int, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(line.split()) == code
    assert f"error: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HelmrError("x"), 1),
        (UsageError("x"), 2),
        (RunFailed("x"), 3),
        (Unavailable("x"), 4),
        (NotAllowed("x"), 4),
        (NotFound("x"), 5),
        (Conflict("x"), 6),
        (TimedOut("x"), 7),
        (KeyboardInterrupt(), 130),
        (ExceptionGroup("several", [ValueError("y"), ExceptionGroup("more", [NotFound("x")])]), 5),
        (PermissionError(13, "Permission denied", "file"), 1),
        (ZeroDivisionError("x"), 1),
        (ExceptionGroup("several", [nats.errors.TimeoutError()]), 4),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error, debug=False) == code
    assert code in EXIT_CODES
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_asks_for_debug_and_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    report(ZeroDivisionError("by zero"), debug=False)
    assert capsys.readouterr().err.splitlines() == [
        "error: ZeroDivisionError: by zero",
        "hint: this is a bug in Helmr; run it again with --debug for the traceback",
    ]
    error = NotFound("no run x")
    error.__cause__ = ConnectionResetError("the reason")
    report(error, debug=True)
    assert "ConnectionResetError: the reason" in capsys.readouterr().err


def test_every_exit_code_of_the_error_tree_is_documented() -> None:
    def tree(kind: type[HelmrError]) -> set[int]:
        return {kind.exit_code}.union(*(tree(child) for child in kind.__subclasses__()))

    assert {code for code in tree(HelmrError) if isinstance(code, int)} <= set(EXIT_CODES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: helmr {name}")
    with click.Context(helmr) as ctx:
        command = helmr.get_command(ctx, name)
    assert isinstance(command, Command | Group)
    assert command.help
    for each in command.commands.values() if isinstance(command, click.Group) else [command]:
        assert each.help


@pytest.mark.parametrize(
    "line",
    [
        "--json --url nats://h:1 --env prod show",
        "show --json --url nats://h:1 --env prod",
        "--json --url nats://other:1 show --env prod --url nats://h:1",
    ],
)
def test_global_options_stand_before_or_after_the_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Flags] = []

    @click.command(cls=Command)
    def show() -> None:
        """Remember."""
        seen.append(flags())

    monkeypatch.setattr(cli_main.Commands, "get_command", lambda *_: show)
    assert call(line.split()) == 0
    assert seen == [Flags(url="nats://h:1", env="prod", json=True)]


def test_a_command_may_have_an_option_of_a_global_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[str, ...], str | None]] = []

    @click.command(cls=Command)
    @click.option("--env", multiple=True)
    def show(env: tuple[str, ...]) -> None:
        """Remember."""
        seen.append((env, flags().env))

    monkeypatch.setattr(cli_main.Commands, "get_command", lambda *_: show)
    assert call(["--env", "prod", "show", "--env", "A=1", "--env", "B=2"]) == 0
    assert seen == [(("A=1", "B=2"), "prod")]


def test_init_writes_a_project_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["init", "agents"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["agents/helmr.toml", "agents/tasks.py", "agents/.helmrignore"]
    assert "helmr dev agents" in err
    assert (tmp_path / "agents" / "helmr.toml").read_text().startswith('project = "agents"')
    assert call(["init", "agents"]) == 6
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["completion", shell]) == 0
    assert f"_HELMR_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_completion_takes_the_shell_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert call(["completion"]) == 0
    assert "zsh_complete" in capsys.readouterr().out
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert call(["completion"]) == 2
