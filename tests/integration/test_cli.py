"""The program ``helmr`` as people and scripts use it: ``helmr dev`` with the process engine, and the commands beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from cli.main import call
from tests.conftest import SHARED
from tests.patience import eventually

ROOT = Path(__file__).parents[2]
TASKS = '''\
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from helmr import logger, task

GREETING = "Hello"


@dataclass
class Greeting:
    name: str = "world"


@task("hello", max_duration="1m")
def hello(payload: Greeting) -> dict[str, str]:
    """Greet somebody."""
    print("on stdout")
    print("on stderr", file=sys.stderr)
    logger.info("greeting", name=payload.name)
    return {"greeting": f"{GREETING}, {payload.name}!"}


@task("fails", max_duration="1m")
def fails() -> None:
    """Fail."""
    Path("notes").mkdir(exist_ok=True)
    Path("notes/a.txt").write_text("one\\n")
    Path("link").symlink_to("notes/a.txt")
    raise ValueError("boom")


@task("slow", max_duration="1m")
def slow() -> None:
    """Take long."""
    for number in range(600):
        print("tick", number, flush=True)
        time.sleep(0.1)


@task("bytes", max_duration="1m")
def raw() -> None:
    """Write a long line, and what is not UTF-8."""
    sys.stdout.buffer.write(b"\\xff\\xfe" + b"x" * 5_000_000 + b"\\n")
'''


class Done(NamedTuple):
    """What a command has written."""

    stdout: str
    stderr: str


class Helmr:
    """A home folder, a project, and the program."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.project = folder / "project"
        self.project.mkdir(parents=True)
        (self.project / "helmr.toml").write_text('project = "acme"\n')
        (self.project / "tasks.py").write_text(TASKS)
        self.log = folder / "dev.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HELMR_")}
        self.env = clean | {"HELMR_HOME": str(self.home), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}

    def start(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """The program, running in the project's folder."""
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "cwd": self.project, "env": self.env} | options
        return subprocess.Popen([sys.executable, "-m", "cli.main", *args], **settings)

    def __call__(self, *args: str, code: int = 0) -> Done:
        """The program, run to its end in this process: starting another one for every command would take its time."""
        raw = io.BytesIO(), io.BytesIO()
        out, err = (io.TextIOWrapper(each, encoding="utf-8", write_through=True) for each in raw)
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            contextlib.chdir(self.project),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            ended = call(args)
        done = Done(*(each.getvalue().decode() for each in raw))
        assert ended == code, f"{args}: {ended}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *args: str, code: int = 0) -> Any:
        """What the program prints with ``--json``."""
        return json.loads(self(*args, "--json", code=code).stdout)

    @contextlib.contextmanager
    def dev(self) -> Iterator[subprocess.Popen[bytes]]:
        """``helmr dev`` for the length of a block; orderly stopped after it, if the block has not done so."""
        with (
            self.log.open("wb") as log,
            self.start(
                *("dev", "--engine", "process", "--metrics", "0", "--json"), stdout=log, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                self("status", "--wait", "30s")
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                finally:
                    process.kill()

    def told(self) -> list[dict[str, Any]]:
        """What ``helmr dev`` has told so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def processes(self) -> dict[int, str]:
        """The processes of this home: pid to command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(self.home) in command or f"HELMR_HOME={self.home}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = command
        return found

    def pid(self, text: str) -> int:
        """The one process whose command line has ``text``."""
        (pid,) = [pid for pid, command in self.processes().items() if text in command]
        return pid


@pytest.fixture(scope="module")
def helmr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helmr]:
    """A running ``helmr dev``."""
    program = Helmr(tmp_path_factory.mktemp(SHARED))
    with program.dev():
        yield program
    assert program.processes() == {}


def test_the_options_of_the_server_are_passed_on(helmr: Helmr) -> None:
    (told,) = (line["text"] for line in helmr.told() if line["what"] == "ready" and line["part"] == "server")
    with urllib.request.urlopen(told.partition("metrics at ")[2]) as answer:  # noqa: S310  # our own
        assert b"helmr_runs" in answer.read()


def test_status_names_every_part(helmr: Helmr) -> None:
    status = helmr.json("status")
    assert status["ready"] is True
    assert status["url"].startswith("nats://127.0.0.1:")
    assert set(status["parts"]) == {"nats", "control", "projector", "workers", "dev"}
    assert all(part["up"] for part in status["parts"].values())
    (worker,) = status["parts"]["workers"]["facts"]["workers"]
    assert (worker["engine"], worker["isolated"]) == ("process", False)


def test_a_start_that_is_followed_shows_everything_in_its_place(helmr: Helmr) -> None:
    args = ("session", "start", "hello", "--payload", "name=Ada", "--follow")
    with helmr.start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as starting:
        out, err = starting.communicate(timeout=30)
    assert starting.returncode == 0
    assert out == b'on stdout\n{"greeting":"Hello, Ada!"}\n'
    assert b"on stderr\n" in err
    assert b" INFO greeting name=Ada\n" in err
    assert b" succeeded in " in err


def test_a_start_that_is_followed_as_json_is_json_lines(helmr: Helmr) -> None:
    out = helmr("session", "start", "hello", "--follow", "--payload-json", "{}", "--json").stdout
    lines = [json.loads(line) for line in out.splitlines()]
    assert [lines[0]["type"], lines[-1]["type"]] == ["started", "run"]
    assert lines[-1]["run"]["output"] == {"greeting": "Hello, world!"}
    assert {line["stream"] for line in lines[1:-1]} == {"stdout", "stderr", "log"}


def test_a_start_prints_the_id_that_other_commands_take(helmr: Helmr) -> None:
    run = helmr("session", "start", "hello", "--payload", "name=B", "--external-id", "b-1").stdout.strip()
    assert helmr("run", "wait", run).stdout == '{"greeting":"Hello, B!"}\n'
    assert helmr.json("run", "get", run[:-4])["id"] == run
    again = helmr.json("session", "start", "hello", "--payload", "name=B", "--external-id", "b-1")
    assert (again["run"]["id"], again["reused"]) == (run, True)
    assert helmr.json("session", "get", again["session"]["id"])["external_id"] == "b-1"
    helmr("session", "start", "hello", "--payload", "name=C", "--external-id", "b-1", code=6)


def test_lists_logs_and_events_of_a_run(helmr: Helmr) -> None:
    run = helmr("session", "start", "hello", "--payload", "name=D", "--tag", "x").stdout.strip()
    helmr("run", "wait", run)
    listed = helmr.json("run", "list", "--task", "hello", "--status", "succeeded")
    assert listed[0]["id"] == run
    assert listed[0]["tags"] == ["x"]
    assert helmr("run", "list", "--limit", "1").stdout.splitlines()[0].split() == [
        *("RUN", "TASK", "STATUS", "ATTEMPT", "CREATED", "TOOK", "FAILURE", "WAITS", "FOR")
    ]
    logs = helmr("run", "logs", run)
    assert logs.stdout == "on stdout\n"
    assert "on stderr" in logs.stderr
    assert json.loads(helmr("run", "logs", run, "--stream", "log").stdout)["fields"] == {"name": "D"}
    kinds = [json.loads(line)["kind"] for line in helmr("run", "events", run).stdout.splitlines()]
    assert kinds == ["queued", "leased", "started", "succeeded"]
    after = helmr("run", "events", run, "--cursor", "2", "--limit", "1", "--follow").stdout
    assert [json.loads(line)["cursor"] for line in after.splitlines()] == [3]


def test_bytes_come_back_as_they_were_written(helmr: Helmr) -> None:
    run = helmr("session", "start", "bytes").stdout.strip()
    helmr("run", "wait", run)
    with helmr.start("run", "logs", run, stdout=subprocess.PIPE) as logs:
        out, _ = logs.communicate(timeout=30)
    assert out == b"\xff\xfe" + b"x" * 5_000_000 + b"\n"


def test_a_reader_that_goes_away_is_no_error(helmr: Helmr) -> None:
    run = helmr("session", "start", "bytes", "--wait").stderr.split()[1]
    with helmr.start("run", "logs", run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as logs:
        assert logs.stdout is not None
        assert logs.stderr is not None
        logs.stdout.read(10)
        logs.stdout.close()
        assert logs.stderr.read() == b""
        assert logs.wait(30) == 141


@pytest.mark.parametrize("how", ["--wait", "--follow"])
def test_a_run_that_fails_ends_with_3(helmr: Helmr, how: str) -> None:
    done = helmr("session", "start", "fails", how, code=3)
    assert done.stdout == ""
    assert 'raise ValueError("boom")' in done.stderr
    assert "failed after" in done.stderr
    assert "task_error: boom" in done.stderr
    run = done.stderr.split()[1]
    assert helmr.json("run", "wait", run, code=3)["failure"]["code"] == "task_error"
    assert "ValueError: boom" in helmr("run", "get", run).stdout


def test_a_run_outlives_the_patience_and_the_ctrl_c_of_its_starter(helmr: Helmr) -> None:
    done = helmr("session", "start", "slow", "--wait", "--timeout", "300ms", code=7)
    run = done.stderr.split()[1]
    assert f"helmr run cancel {run}" in done.stderr
    with helmr.start("run", "logs", run, "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"tick 0\n"
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=10)
    assert following.returncode == 130
    assert b"goes on" in err
    assert helmr.json("run", "get", run)["status"] == "running"
    helmr("run", "cancel", run, "--reason", "enough", "--force")
    assert "cancelled" in helmr("run", "wait", run, code=3).stderr


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("session start hello --payload name=5", 2, "payload does not fit task hello"),
        ("session start helo", 5, "helo"),
        ("run get run_nothing", 5, "run_nothing"),
        ("run logs run_nothing", 5, "run_nothing"),
        ("task get helo", 5, "did you mean 'hello'?"),
        ("sandbox get none", 5, "helmr sandbox list"),
        ("deployment promote 20000101.1", 5, "20000101.1"),
        ("workspace get ws_nothing", 5, "ws_nothing"),
        ("query nonsense", 2, "error: "),
        ("dev", 6, "a Helmr server runs already"),
        ("server", 6, "runs already in"),
    ],
)
def test_what_is_not_there_is_said(helmr: Helmr, line: str, code: int, error: str) -> None:
    done = helmr(*line.split(), code=code)
    assert done.stdout == ""
    assert error in done.stderr


def test_queries_answer_in_every_format(helmr: Helmr, tmp_path: Path) -> None:
    helmr("session", "start", "hello", "--payload", "name=Q", "--wait")
    sql = "select task_id, output from runs where payload->>'name' = 'Q'"
    row = {"task_id": "hello", "output": {"greeting": "Hello, Q!"}}
    assert json.loads(helmr("query", sql).stdout) == row
    assert helmr.json("query", sql) == [row]
    assert helmr("query", sql, "--format", "csv").stdout.splitlines()[0] == "task_id,output"
    helmr("query", sql, "-o", str(tmp_path / "rows.parquet"))
    assert (tmp_path / "rows.parquet").read_bytes()[:4] == b"PAR1"
    cut = helmr("query", "select * from range(10)", "--limit", "3")
    assert len(cut.stdout.splitlines()) == 3
    assert "cut off" in cut.stderr


def test_deployments_tasks_sandboxes_and_workspaces(helmr: Helmr) -> None:
    version = helmr("deploy", "--no-promote").stdout.strip()
    found = {each["version"]: each["current"] for each in helmr.json("deployment", "list")}
    assert found[version] is False
    assert helmr.json("deployment", "get", version)["version"] == version
    assert helmr.json("deployment", "promote", version)["current"] is True
    assert {task["id"] for task in helmr.json("task", "list")} == {"hello", "fails", "slow", "bytes"}
    assert "Greet somebody." in helmr("task", "get", "hello").stdout
    assert helmr.json("sandbox", "get", "default")["name"] == "default"
    helmr("session", "start", "hello", "--payload-json", "{}", "--wait")
    assert helmr.json("workspace", "list")[0]["state"] == "live"
    tagged = helmr.json("workspace", "update", "@last", "--tag", "kept", "--metadata-json", '{"owner": "ada"}')
    assert (tagged["tags"], tagged["metadata"]) == (["kept"], {"owner": "ada"})
    assert [each["id"] for each in helmr.json("workspace", "list", "--tag", "kept")] == [tagged["id"]]
    assert helmr.json("workspace", "list", "--tag", "other") == []
    assert "--tag" in helmr("workspace", "update", "@last", code=2).stderr
    assert helmr.json("workspace", "stop", "@last")["state"] == "stopped"
    again = helmr("session", "start", "hello", "--payload-json", "{}", "--wait", "--workspace", "@last")
    assert "Hello" in again.stdout


def test_doctor_finds_nothing_wrong_with_a_server_that_runs(helmr: Helmr) -> None:
    found = {each["check"]: each["state"] for each in json.loads(_doctor(helmr))}
    for check in ("python", "home", "nats-server", "nats", "control", "projector", "workers", "dev", "clock"):
        assert found[check] == "ok"


def _doctor(helmr: Helmr) -> str:
    with helmr.start("doctor", "--json", stdout=subprocess.PIPE) as doctor:
        out, _ = doctor.communicate(timeout=30)
    assert doctor.returncode in {0, 1}  # there may be no Docker engine here
    return out.decode()


def test_a_change_is_deployed_and_a_broken_module_is_not(helmr: Helmr) -> None:
    before = helmr.json("deployment", "get")["version"]
    tasks = helmr.project / "tasks.py"
    tasks.write_text(TASKS.replace('GREETING = "Hello"', 'GREETING = "Hi"'))
    helmr("status", "--wait", "10s")
    assert helmr("session", "start", "hello", "--payload", "name=E", "--wait").stdout == '{"greeting":"Hi, E!"}\n'
    current = helmr.json("deployment", "get")["version"]
    assert current != before
    tasks.write_text("x = (\n")
    eventually(lambda: helmr.told()[-1]["what"] == "deploy_failed")
    assert "tasks.py:1" in helmr.told()[-1]["error"]["message"]
    assert helmr.json("status", code=1)["parts"]["dev"]["up"] is False
    assert helmr.json("deployment", "get")["version"] == current
    tasks.write_text(TASKS)
    helmr("status", "--wait", "10s")
    assert helmr("session", "start", "hello", "--payload", "name=F", "--wait").stdout == '{"greeting":"Hello, F!"}\n'


@pytest.mark.parametrize("victim", ["cli.main worker", "store.main", "nats-server", "cli.main server"])
def test_a_part_that_is_killed_heals_by_itself(helmr: Helmr, victim: str) -> None:
    url = helmr.json("status")["url"]
    killed = helmr.pid(victim)
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: killed not in helmr.processes())
    helmr("status", "--wait", "20s")
    done = helmr("session", "start", "hello", "--payload", f"name={victim}", "--wait", "--timeout", "20s")
    assert done.stdout == f'{{"greeting":"Hello, {victim}!"}}\n'
    eventually(lambda: any(victim in command for command in helmr.processes().values()))
    helmr("status", "--wait", "20s")
    assert helmr.json("status")["url"] == url
    rows = helmr.json("query", "select payload->>'name' as name from runs where task_id = 'hello'")
    assert [row["name"] for row in rows].count(victim) == 1


def test_ctrl_c_leaves_nothing_but_the_state(tmp_path: Path) -> None:
    helmr = Helmr(tmp_path)
    with helmr.dev() as dev:
        run = helmr("session", "start", "slow").stdout.strip()
        with helmr.start("run", "logs", run, "--follow", stdout=subprocess.PIPE) as following:
            assert following.stdout is not None
            following.stdout.readline()
            following.terminate()
        began = time.monotonic()
        dev.send_signal(signal.SIGINT)
        assert dev.wait(20) == 0
        assert time.monotonic() - began < 10
    assert helmr.processes() == {}
    assert not (helmr.home / "connection.json").exists()
    assert not (helmr.home / "dev.json").exists()
    with helmr.dev():
        assert helmr.json("run", "get", run)["id"] == run
        assert helmr.told()[1]["what"] in {"deployed", "part", "ready"}
        helmr("run", "cancel", run, "--force")


def test_the_parts_run_separately_too(tmp_path: Path) -> None:
    helmr = Helmr(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(helmr.start("server", "--port", str(port), "--json", stdout=subprocess.PIPE))
        stack.callback(server.terminate)
        assert server.stdout is not None
        assert json.loads(server.stdout.readline())["url"] == f"nats://127.0.0.1:{port}"
        worker = stack.enter_context(
            helmr.start("worker", "--engine", "process", "--slots", "3", "--json", stdout=subprocess.PIPE)
        )
        stack.callback(worker.terminate)
        assert worker.stdout is not None
        ready = json.loads(worker.stdout.readline())
        assert (ready["slots"], ready["engine"], ready["group"]) == (3, "process", "default")
        helmr("status", "--wait", "5s")
        assert helmr("deploy").stdout.strip().endswith(".1")
        helmr("session", "start", "hello", "--payload", "name=S", "--wait")
        for process in (worker, server):
            process.terminate()
            assert process.wait(20) == 0
    assert helmr.processes() == {}


@pytest.mark.parametrize(
    ("change", "args", "code", "error"),
    [
        ("file", ["server"], 2, "cannot be used: it is a file"),
        ("port", ["server"], 2, "cannot listen on 127.0.0.1"),
        ("binary", ["server"], 2, "no nats-server found"),
        ("engine", ["worker"], 4, "no Docker engine answers at unix:///nowhere.sock"),
        ("engine", ["dev"], 4, "no Docker engine answers at unix:///nowhere.sock"),
        ("home", ["dev"], 2, "cannot be used: it is a file"),
    ],
)
def test_what_cannot_be_started_says_why(tmp_path: Path, change: str, args: list[str], code: int, error: str) -> None:
    helmr = Helmr(tmp_path)
    with contextlib.ExitStack() as stack:
        if change in {"file", "home"}:
            helmr.home.write_text("")
        if change == "engine":
            helmr.env["DOCKER_HOST"] = "unix:///nowhere.sock"
        if change == "port":
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            args = [*args, "--port", str(taken.getsockname()[1])]
        if change == "binary":
            stack.enter_context(mock.patch("bus.server.sys.executable", "/nowhere/python"))
            stack.enter_context(mock.patch("bus.server.shutil.which", return_value=None))
        done = helmr(*args, code=code)
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert helmr.processes() == {}


def test_a_home_without_room_is_refused(helmr: Helmr, small_disk: Path) -> None:
    home = small_disk / "home"
    assert "1 MiB free, too little to work with" in helmr("server", "--home", str(home), code=2).stderr
    with contextlib.suppress(OSError):
        (small_disk / "rest").write_bytes(bytes(2 * 1024**2))
    assert "no space is left on the device" in helmr("server", "--home", str(home / "b"), code=2).stderr
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for args in (["server"], ["worker", "--engine", "process"]):
        assert "the file system is read-only" in helmr(*args, "--home", str(home / "b"), code=2).stderr


def test_help_is_quick_because_it_imports_little() -> None:
    heavy = {"duckdb", "pyarrow", "docker", "nats", "rich", "asyncio", "msgspec", "watchfiles", "anyio"}
    code = f"""
import sys
from cli.main import call
assert call(["--help"]) == 0
print({heavy!r} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=30
    )
    assert done.stderr.strip() == "set()"


def test_the_reference_page_is_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "cli-reference", "--check"], check=True, timeout=30)


def test_a_secret_is_read_from_standard_input_and_never_shown(helmr: Helmr) -> None:
    with helmr.start("secret", "set", "TOKEN", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as setting:
        out, _ = setting.communicate(b"s3cr3t-value\n", timeout=30)
    assert (setting.returncode, out) == (0, b"")
    stored = helmr.json("secret", "get", "TOKEN")
    assert (stored["name"], stored["version"], stored["project"]) == ("TOKEN", 1, "acme")
    shown = helmr("secret", "get", "TOKEN").stdout + helmr("secret", "list").stdout + str(helmr.json("secret", "list"))
    assert "TOKEN" in shown
    assert "s3cr3t" not in shown
    assert helmr.json("secret", "rotate")["reencrypted"] == 1
    helmr("secret", "delete", "TOKEN")
    refused = helmr("secret", "get", "TOKEN", code=5)
    assert "hint: store it: helmr secret set TOKEN" in refused.stderr


def test_files_of_a_workspace_are_read_from_its_versions(helmr: Helmr) -> None:
    run = helmr.json("session", "start", "fails", "--wait", code=3)["run"]
    workspace = run["workspace_id"]
    (version,) = helmr.json("workspace", "versions", workspace)
    assert (version["number"], version["run_id"], version["files"]) == (1, run["id"], 1)
    assert run["id"] in helmr("workspace", "versions", workspace).stdout
    listed = helmr("workspace", "files", "ls", workspace, "-r").stdout
    assert "-rw-r--r--" in listed
    assert "notes/a.txt" in listed
    with helmr.start("workspace", "files", "cat", workspace, "notes/a.txt", stdout=subprocess.PIPE) as reading:
        assert reading.communicate(timeout=30)[0] == b"one\n"
    assert helmr.json("workspace", "files", "stat", workspace, "link")["target"] == "notes/a.txt"
    helmr("workspace", "files", "cat", workspace, "nothing", code=5)
    fork = helmr("workspace", "fork", workspace).stdout.strip()
    assert helmr.json("workspace", "get", fork)["version"] == version["id"]
    assert helmr.json("workspace", "restore", workspace, "--version", "1")["state"] == "stopped"
