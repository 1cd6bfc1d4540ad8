"""What every engine promises: the same suite holds the docker and the process engine to one behaviour."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from helmr import ids
from helmr.errors import Conflict, Unavailable, UsageError
from helmr.guest import transfer
from tests.conftest import SHARED
from tests.docker.engines import FACTORIES, Materialize, python, run
from worker.channel import Channel, ChannelProcess
from worker.docker_engine import DockerEngine
from worker.docker_machine import DockerMachine
from worker.engine import (
    Engine,
    Exited,
    ImageSpec,
    Machine,
    MachineSpec,
    Message,
    Output,
    Process,
    ProcessSpec,
    SecretFile,
    Terminal,
)
from worker.process_machine import ProcessMachine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def engine_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home so deep that no unix socket in it has a path of acceptable length."""
    return tmp_path_factory.mktemp(SHARED) / "deep" / ("x" * 100)


@pytest.fixture(scope="module")
async def engine(engine_name: str, home: Path) -> AsyncIterator[Engine]:
    """One engine for the module; the tests' machines must be gone when it closes."""
    engine = FACTORIES[engine_name](home)
    yield engine
    assert await engine.collect(set()) == []
    await engine.close()
    assert _processes_of(home) == []


@pytest.fixture(scope="module")
async def machine(materialize: Materialize) -> Machine:
    """A machine for all tests that leave it as it was."""
    return await materialize(memory=512 * 1024**2, pids=128)


def _processes_of(home: Path) -> list[int]:
    """Supervisors, zygotes and shims of a home, as seen from the host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if bytes(home) in path.read_bytes():
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


async def _start(machine: Machine, code: str, **options: Any) -> ChannelProcess:
    spec = ProcessSpec(id=ids.new("run"), kind="argv", argv=("python3", "-c", code), **options)
    process = await machine.start(spec)
    assert isinstance(process, ChannelProcess)
    return process


async def _until(process: ChannelProcess, text: bytes) -> None:
    """Take output until ``text`` has come."""
    seen = b""
    async for frame in process.frames():
        assert isinstance(frame, Output), frame
        seen += frame.data
        if text in seen:
            return


async def _exit(process: Process) -> Exited:
    """Take everything that is left, down to the last frame."""
    frames = [frame async for frame in process.frames()]
    assert [isinstance(frame, Exited) for frame in frames].count(True) == 1
    assert isinstance(frames[-1], Exited)
    return frames[-1]


async def _survivors(machine: Machine, marker: str) -> list[str]:
    """Processes of the machine whose command line or environment names ``marker``, zombies apart."""
    code = """
import os, pathlib, sys
for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if int(path.name) != os.getpid() and os.environ["WANTED"].encode() in (path / "cmdline").read_bytes():
            print(path.name)
    except OSError: pass
"""
    return (await python(machine, code, env={"WANTED": marker})).stdout.split()


# Output


async def test_output_arrives_while_the_process_runs(machine: Machine) -> None:
    await run(machine, "mkfifo", "gate")
    process = await _start(machine, "print('ready'); print('done', open('gate').read())")
    await _until(process, b"ready\n")
    await run(machine, "sh", "-c", "printf go > gate")
    await _until(process, b"done go\n")
    assert (await _exit(process)).exit_code == 0
    await run(machine, "rm", "gate")


async def test_streams_are_kept_apart_and_in_order(machine: Machine) -> None:
    code = "import os\nfor n in range(2000): os.write(1 + n % 2, b'%d\\n' % n)"
    finished = await python(machine, code)
    assert finished.stdout.split() == [str(n) for n in range(0, 2000, 2)]
    assert finished.stderr.split() == [str(n) for n in range(1, 2000, 2)]


async def test_offsets_count_the_bytes_of_each_stream(machine: Machine) -> None:
    process = await _start(machine, "import os\nfor _ in range(50): os.write(1, b'abc'); os.write(2, b'x' * 7000)")
    at = {"stdout": 0, "stderr": 0}
    async for frame in process.frames():
        if isinstance(frame, Output):
            assert frame.offset == at[frame.stream]
            at[frame.stream] += len(frame.data)
    assert at == {"stdout": 150, "stderr": 350_000}


@pytest.mark.parametrize(
    "content",
    ["b'x' * 5_000_000 + b'\\n'", "bytes(range(256)) * 1000"],
    ids=["a line of 5 MB", "bytes that are not UTF-8"],
)
async def test_any_bytes_come_through_unchanged(machine: Machine, content: str) -> None:
    process = await _start(machine, f"import sys; sys.stdout.buffer.write({content})")
    received = b"".join([frame.data async for frame in process.frames() if isinstance(frame, Output)])
    assert hashlib.sha256(received).digest() == hashlib.sha256(eval(content)).digest()  # noqa: S307


async def _resident(machine: Machine) -> tuple[int, int]:
    """Memory of this process and of the machine's supervisor, in bytes."""
    pid = machine.ref if isinstance(machine, ProcessMachine) else "1"
    status = (await run(machine, "cat", f"/proc/{pid}/status")).stdout + Path("/proc/self/status").read_text()
    theirs, ours = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    return ours, theirs


async def test_a_flood_of_200_mb_takes_little_memory_anywhere(machine: Machine) -> None:
    before = await _resident(machine)
    process = await _start(machine, "import os\nchunk = b'y' * 65536\nfor _ in range(3200): os.write(1, chunk)")
    total = 0
    async for frame in process.frames():
        if isinstance(frame, Output):
            total += len(frame.data)
            if total % (20 * 65536) == 0:
                await asyncio.sleep(0)  # a consumer that does something else now and then
    assert total == 3200 * 65536
    after = await _resident(machine)
    assert all(late - early < 24 * 1024**2 for early, late in zip(before, after, strict=True))


async def test_a_reader_that_stalls_blocks_its_process_and_no_other(machine: Machine) -> None:
    flood = "import os\nfor _ in range(800): os.write(1, b'z' * 65536)\nopen('flood-done', 'w')"
    parked = await _start(machine, flood)
    await anext(parked.frames())
    # 50 MB cannot have been written: the window is 4 MiB.
    finished = await run(machine, "sh", "-c", "ls; echo err >&2")
    assert "flood-done" not in finished.stdout
    assert (finished.stderr, finished.exited.exit_code) == ("err\n", 0)
    rest = sum([len(frame.data) async for frame in parked.frames() if isinstance(frame, Output)])
    assert rest > 46 * 1024**2
    assert "flood-done" in (await run(machine, "ls")).stdout
    await run(machine, "rm", "flood-done")


async def test_a_parked_process_can_be_cancelled_and_says_all_it_wrote(machine: Machine) -> None:
    process = await _start(machine, "import os\nwhile True: os.write(1, b'z' * 65536)")
    await anext(process.frames())
    await process.cancel(0)
    exited = await _exit(process)
    assert (exited.cause, exited.signal) == ("cancel", signal.SIGKILL)


# How processes end


@pytest.mark.parametrize(
    ("argv", "code", "number"),
    [(("true",), 0, None), (("sh", "-c", "exit 7"), 7, None), (("sh", "-c", "kill -USR1 $$"), None, signal.SIGUSR1)],
)
async def test_the_exit_status_is_told(
    machine: Machine, argv: tuple[str, ...], code: int | None, number: int | None
) -> None:
    exited = (await run(machine, *argv)).exited
    assert (exited.exit_code, exited.signal, exited.cause, exited.oom) == (code, number, "exit", False)


@pytest.mark.parametrize(
    ("options", "code", "detail"),
    [
        ({"argv": ("no-such-program",)}, 127, "'no-such-program': no such program"),
        ({"argv": ("/",)}, 126, "'/': Permission denied"),
        ({"argv": ()}, 126, "cannot execute []"),
        ({"argv": ("true",), "cwd": "/no/such/folder"}, 127, "cannot enter the working folder /no/such/folder"),
        ({"kind": "task", "source": "missing"}, 1, "'missing' has not been delivered"),
    ],
)
async def test_what_cannot_be_started_says_why(
    machine: Machine, options: dict[str, Any], code: int, detail: str
) -> None:
    process = await machine.start(ProcessSpec(id=ids.new("run"), **{"kind": "argv", **options}))
    (exited,) = [frame async for frame in process.frames()]
    assert isinstance(exited, Exited)
    assert exited.exit_code == code
    assert detail in exited.detail


async def test_a_cancelled_process_may_end_in_good_order(machine: Machine) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('ready'); time.sleep(60)"
    process = await _start(machine, code)
    await _until(process, b"ready")
    await process.cancel(30)
    exited = await _exit(process)
    assert (exited.exit_code, exited.signal, exited.cause) == (5, None, "cancel")


_IGNORANT = "import signal, time, os; signal.signal(15, signal.SIG_IGN)\n"
_HOSTILE = {
    "32 children that ignore SIGTERM": """
for _ in range(32):
    if os.fork() == 0: break
else: print('ready')
time.sleep(60)
""",
    "a double fork with setsid": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        if os.fork() == 0: os.setsid()
        print('ready'); time.sleep(60)
    os._exit(0)
os.wait(); time.sleep(60)
""",
    "a process that replaces itself all the time": """
def respawn(*_):
    while os.fork(): os._exit(0)
    os.setsid()
signal.signal(15, respawn)
print('ready')
if os.fork() == 0:
    while True: respawn()
time.sleep(60)
""",
}


@pytest.mark.parametrize("tree", _HOSTILE)
async def test_nothing_of_a_hostile_tree_survives_a_cancel(machine: Machine, tree: str) -> None:
    marker = ids.new("run")
    process = await _start(machine, f"# {marker}\n{_IGNORANT}{_HOSTILE[tree]}")
    await _until(process, b"ready")
    await process.cancel(0.1)
    exited = await _exit(process)
    assert exited.cause == "cancel"
    assert await _survivors(machine, marker) == []


async def test_a_second_cancel_shortens_the_grace(machine: Machine) -> None:
    process = await _start(machine, f"{_IGNORANT}print('ready'); time.sleep(60)")
    await _until(process, b"ready")
    await process.cancel(60)
    await process.cancel(0.05)
    async with asyncio.timeout(60):
        exited = await _exit(process)
    assert (exited.signal, exited.cause) == (signal.SIGKILL, "cancel")


async def test_the_deadline_is_kept(machine: Machine) -> None:
    # A shell ignores the signal in a hundredth of the time that it has, even if the machine is busy.
    argv = ("sh", "-c", "trap '' TERM; exec sleep 600")
    process = await machine.start(ProcessSpec(id=ids.new("run"), kind="argv", argv=argv, deadline=1.0, grace=0.1))
    async with asyncio.timeout(60):
        exited = await _exit(process)
    assert (exited.signal, exited.cause) == (signal.SIGKILL, "deadline")


async def test_a_daemon_that_a_process_leaves_behind_is_ended(machine: Machine) -> None:
    marker = ids.new("run")
    code = f"# {marker}\nimport os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nprint('bye')"
    async with asyncio.timeout(60):
        finished = await python(machine, code)
    assert (finished.stdout, finished.exited.exit_code, finished.exited.cause) == ("bye\n", 0, "exit")
    assert await _survivors(machine, marker) == []


async def test_many_processes_run_side_by_side(machine: Machine) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(machine, "sh", "-c", f"echo {n}; exit {n}")) for n in range(20)]
    assert [(task.result().stdout, task.result().exited.exit_code) for task in tasks] == [
        (f"{n}\n", n) for n in range(20)
    ]


@pytest.mark.docker
async def test_a_child_killed_for_memory_is_noticed(machine: Machine) -> None:
    if not isinstance(machine, DockerMachine):
        pytest.skip("only a container has a memory limit")
    finished = await run(machine, "sh", "-c", "python3 -c 'bytearray(2**30)'; echo $?")
    assert (finished.stdout, finished.exited.exit_code, finished.exited.oom) == ("137\n", 0, True)


@pytest.mark.docker
async def test_starts_beyond_the_limit_of_processes_fail_with_the_reason(
    engine: Engine, materialize: Materialize
) -> None:
    if not isinstance(engine, DockerEngine):
        pytest.skip("only a container has a limit of processes")
    machine = await materialize(pids=24)
    processes = [await _start(machine, "import time; print('ready'); time.sleep(60)") for _ in range(24)]
    first = [await anext(process.frames()) for process in processes]
    failed = [frame.detail for frame in first if isinstance(frame, Exited)]
    assert set(failed) == {"the process could not be started: Resource temporarily unavailable"}
    assert 0 < len(failed) < 24
    for process in processes:
        await process.cancel(0)
    assert [isinstance(frame, Output) for frame in first] == [
        any([isinstance(frame, Exited) async for frame in process.frames()]) for process in processes
    ]
    assert (await run(machine, "echo", "alive")).stdout == "alive\n"
    await machine.stop(0)


# What processes are given


async def test_environment_and_secrets_reach_the_process_alone(machine: Machine) -> None:
    finished = await run(
        machine, "sh", "-c", "echo $PLAIN $TOKEN $LANG", env={"PLAIN": "p"}, secrets={"TOKEN": "s3cr3t-value"}
    )
    assert finished.stdout == "p s3cr3t-value C.UTF-8\n"
    assert (await run(machine, "sh", "-c", "echo [$TOKEN]")).stdout == "[]\n"
    if isinstance(machine, ProcessMachine):
        for name in ("environ", "cmdline"):
            assert b"s3cr3t-value" not in Path(f"/proc/{machine.ref}/{name}").read_bytes()


_LOOK = """
import os, pathlib, stat, sys
root = pathlib.Path(os.environ.get("HELMR_SECRET_ROOT", "/"))
for name in sys.argv[1:]:
    path = root / name
    status = path.stat() if path.exists() else None
    print(path.read_text() if status else None, oct(stat.S_IMODE(status.st_mode)) if status else None)
    print("mine" if status and status.st_uid == os.getuid() else None)
"""


async def test_secret_files_are_the_processes_own_and_go_with_it(machine: Machine) -> None:
    files = (
        SecretFile(path="/run/secrets/one", value="s3cr3t-1"),
        SecretFile(path="/run/deep/er/two", value="s3cr3t-2", mode=0o640),
    )
    look = ("python3", "-c", _LOOK, "run/secrets/one", "run/deep/er/two")
    found = await run(machine, *look, secret_files=files)
    assert found.stdout.split("\n")[:-1] == ["s3cr3t-1 0o400", "mine", "s3cr3t-2 0o640", "mine"], found.stderr
    assert (await run(machine, *look)).stdout.split() == ["None"] * 6


async def test_a_secret_file_stays_until_its_last_process_has_ended(machine: Machine) -> None:
    file = SecretFile(path="/run/secrets/shared", value="s3cr3t")
    await run(machine, "mkfifo", "shared-gate")
    first = await _start(machine, "print('up'); open('shared-gate').read()", secret_files=(file,))
    await _until(first, b"up")
    look = ("python3", "-c", _LOOK, "run/secrets/shared")
    again = SecretFile(path="/run/secrets/shared", value="s3cr3t-2")
    assert (await run(machine, *look, secret_files=(again,))).stdout.split()[0] == "s3cr3t-2"
    assert (await run(machine, *look)).stdout.split()[0] == "s3cr3t-2"
    await run(machine, "sh", "-c", "echo > shared-gate")
    await _exit(first)
    assert (await run(machine, *look)).stdout.split()[0] == "None"


@pytest.mark.parametrize("path", ["/etc/passwd", "/run/../tmp/x", "/run/x/.."])
async def test_a_secret_file_elsewhere_keeps_the_process_from_starting(machine: Machine, path: str) -> None:
    file = SecretFile(path=path, value="s3cr3t")
    finished = await run(machine, "echo", "never", secret_files=(file,))
    assert (finished.stdout, finished.exited.exit_code) == ("", None)
    assert finished.exited.detail == f"its secrets could not be put in place: a secret cannot be put into {path}"


async def test_input_is_fed_and_ended(machine: Machine) -> None:
    data = os.urandom(2_500_000)
    process = await machine.start(ProcessSpec(id=ids.new("exec"), kind="argv", argv=("sha256sum",), input=True))
    assert isinstance(process, ChannelProcess)
    taken: list[int] = []
    process.on_taken(taken.append)
    process.feed(data)
    process.end_input()
    await _until(process, hashlib.sha256(data).hexdigest().encode())
    assert (await _exit(process)).exit_code == 0
    assert taken[-1] == len(data)


async def test_a_terminal_belongs_to_the_process(machine: Machine) -> None:
    script = "stty size; echo by-name > $(tty); trap 'echo resized' WINCH; read line; echo $line; exit 3"
    spec = ProcessSpec(
        id=ids.new("pty"), kind="argv", argv=("bash", "-c", script), terminal=Terminal(rows=31, columns=99)
    )
    process = await machine.start(spec)
    assert isinstance(process, ChannelProcess)
    await _until(process, b"31 99\r\nby-name\r\n")
    process.resize(Terminal(rows=50, columns=90))
    process.feed(b"typed\n")
    await _until(process, b"typed\r\n")
    assert (await _exit(process)).exit_code == 3


async def test_files_are_copied_in_and_out_as_the_tasks_user(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho $1\n")
    (tmp_path / "tool").chmod(0o700)
    packed = io.BytesIO()
    transfer.pack(str(tmp_path / "tool"), packed)
    task = {"op": "receive", "path": "bin/", "name": "tool"}
    process = await machine.start(ProcessSpec(id=ids.new("exec"), kind="files", task=task, input=True))
    assert isinstance(process, ChannelProcess)
    process.feed(packed.getvalue())
    process.end_input()
    assert (await _exit(process)).exit_code == 0
    assert (await run(machine, "bin/tool", "hello")).stdout == "hello\n"
    spec = ProcessSpec(id=ids.new("exec"), kind="files", task={"op": "send", "path": "bin"}, input=True)
    sending = await machine.start(spec)
    back = b"".join([frame.data async for frame in sending.frames() if isinstance(frame, Output)])
    transfer.unpack(io.BytesIO(back), str(tmp_path), "back", None)
    assert (tmp_path / "back" / "tool").read_bytes() == (tmp_path / "tool").read_bytes()


async def test_the_workers_own_environment_stays_with_it(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELMR_API_KEY", "key")
    assert "HELMR_API_KEY" not in (await run(machine, "env")).stdout


async def test_the_workspace_is_where_processes_start(machine: Machine) -> None:
    finished = await run(machine, "sh", "-c", "pwd -P; echo $HELMR_WORKSPACE $HELMR_WORKSPACE_ID; cd; pwd -P; touch x")
    folder, variables, home = finished.stdout.splitlines()
    assert variables == f"{folder} {machine.workspace_id}"
    assert home != folder
    assert finished.exited.exit_code == 0


async def test_output_can_be_reopened_by_name(machine: Machine) -> None:
    finished = await run(machine, "sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr")
    assert (finished.stdout, finished.stderr) == ("a\n", "b\n")


async def test_files_outlive_the_machine(materialize: Materialize) -> None:
    machine = await materialize()
    await run(machine, "sh", "-c", "mkdir deep; echo kept > deep/file")
    await machine.stop()
    await machine.stop()
    again = await materialize(machine.workspace_id)
    assert (await run(again, "cat", "deep/file")).stdout == "kept\n"
    await again.stop(0)


async def test_a_deleted_workspace_starts_empty(engine: Engine, materialize: Materialize) -> None:
    machine = await materialize()
    await run(machine, "sh", "-c", "mkdir -p a/b; touch a/b/file; chmod 0 a/b")
    await engine.delete(machine.workspace_id)
    await engine.delete(machine.workspace_id)
    again = await materialize(machine.workspace_id)
    assert (await run(again, "ls", "-A")).stdout == ""
    await again.stop(0)


async def test_a_source_is_there_once_delivered(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "flow.py").write_text(
        "from helmr import logger, task\n"
        "@task('greet')\n"
        "def greet(payload):\n"
        "    print('working on', payload['name'])\n"
        "    logger.info('greeting')\n"
        "    print('more')\n"
        "    return 'hello ' + payload['name']\n"
    )
    (tmp_path / "tree" / "flow.py").chmod(0o600)
    for _ in range(2):
        await machine.put_source("dep_1", tmp_path / "tree")
    task = {"module": "flow", "task_id": "greet", "payload": {"name": "you"}, "ctx": {}}
    process = await machine.start(ProcessSpec(id=ids.new("run"), source="dep_1", task=task))
    ops, written, before_log = [], b"", b""
    async for frame in process.frames():
        match frame:
            case Output():
                written += frame.data
            case Message(body):
                ops.append(body)
                before_log = written if body["op"] == "log" else before_log
            case Exited():
                assert frame == Exited(exit_code=0)
    assert [body["op"] for body in ops] == ["started", "log", "result"]
    assert ops[-1]["output"] == "hello you"
    assert written == b"working on you\nmore\n"
    assert before_log.startswith(b"working on you\n")


async def test_sources_cannot_be_changed_in_a_container(machine: Machine) -> None:
    if not isinstance(machine, DockerMachine):
        pytest.skip("without isolation nothing is read-only")
    assert "Read-only" in (await run(machine, "touch", "/helmr/sources/x")).stderr


# The life of a machine


async def test_ids_are_taken_once(machine: Machine) -> None:
    process = await _start(machine, "import time; print('ready'); time.sleep(60)")
    with pytest.raises(Conflict, match=process.id):
        await machine.start(ProcessSpec(id=process.id, kind="argv", argv=("true",)))
    await process.cancel(0)
    await _exit(process)


async def test_a_stopped_machine_starts_nothing(materialize: Materialize) -> None:
    machine = await materialize()
    process = await _start(machine, "import time; print('ready'); time.sleep(60)")
    await _until(process, b"ready")
    await machine.stop(1)
    assert (await _exit(process)).cause == "cancel"
    assert await machine.wait_lost()
    with pytest.raises(Unavailable):
        await _start(machine, "pass")


async def test_a_machine_that_is_killed_loses_its_processes_and_leaves_nothing(
    engine: Engine, materialize: Materialize
) -> None:
    machine: Machine = await materialize()
    marker = ids.new("run")
    process = await _start(machine, f"# {marker}\nimport time; print('ready'); time.sleep(60)")
    await _until(process, b"ready")
    if isinstance(engine, DockerEngine):
        await engine._api.call(lambda client: client.kill(machine.ref))
    else:
        os.kill(int(machine.ref), signal.SIGKILL)
    async with asyncio.timeout(60):
        exited = await _exit(process)
        reason = await machine.wait_lost()
    assert (exited.cause, exited.exit_code, exited.signal) == ("lost", None, None)
    assert reason
    again = await materialize(machine.workspace_id)
    assert await _survivors(again, marker) == []
    await machine.stop()
    await again.stop(0)


async def _take(process: ChannelProcess, seen: dict[str, bytes], count: int) -> bool:
    """Store up to ``count`` outputs, as a worker does that dies then; True at the end."""
    async for frame in process.frames():
        if not isinstance(frame, Output):
            return True
        assert frame.offset == len(seen[frame.stream])
        seen[frame.stream] += frame.data
        count -= 1
        if count == 0:
            break
    return False


async def test_a_worker_that_comes_back_misses_no_byte(materialize: Materialize) -> None:
    machine = await materialize()
    process = await _start(machine, "import os\nfor n in range(300_000): os.write(1 + n % 2, b'%d\\n' % n)")
    seen: dict[str, bytes] = {"stdout": b"", "stderr": b""}
    channel = machine._channel
    while not await _take(process, seen, 500):
        # The last frame has been stored, but not acknowledged: the worker dies, and the next one knows what is stored.
        channel.close("kill -9")
        channel = await Channel.connect(machine.folder.socket(), resume={process.id: process._handed_out})
        process = channel.attached[process.id]
    assert seen["stdout"].split() == [b"%d" % n for n in range(0, 300_000, 2)]
    assert seen["stderr"].split() == [b"%d" % n for n in range(1, 300_000, 2)]
    channel.close()
    channel = await Channel.connect(machine.folder.socket(), resume={process.id: process._handed_out})
    assert channel.attached == {}
    channel.close()
    await machine.stop()


async def test_what_a_vanished_worker_left_is_removed_before_the_next_machine(
    engine_name: str, home: Path, materialize: Materialize, image: str
) -> None:
    left: Machine = await materialize()
    await run(left, "sh", "-c", "echo kept > file")
    marker = ids.new("run")
    process = await _start(left, f"# {marker}\nimport time; print('ready'); time.sleep(60)")
    await _until(process, b"ready")
    later = FACTORIES[engine_name](home)
    machine = await later.materialize(MachineSpec(workspace_id=left.workspace_id, worker_id="wrk_2", image=image))
    assert (await _exit(process)).cause in {"lost", "cancel"}
    assert (await run(machine, "cat", "file")).stdout == "kept\n"
    assert await _survivors(machine, marker) == []
    await later.close()
    await left.stop()


async def test_a_worker_that_wakes_up_late_leaves_its_successor_alone(
    engine_name: str, home: Path, materialize: Materialize, image: str
) -> None:
    successor: Machine = await materialize(claim=7)
    late = FACTORIES[engine_name](home)
    spec = MachineSpec(workspace_id=successor.workspace_id, worker_id="wrk_late", image=image, claim=5)
    with pytest.raises(Unavailable, match="another worker"):
        await late.materialize(spec)
    assert (await run(successor, "echo", "alive")).stdout == "alive\n"
    await late.close()
    await successor.stop()


async def test_machines_of_dead_workers_are_collected(
    engine_name: str, home: Path, engine: Engine, materialize: Materialize, machine: Machine
) -> None:
    left: Machine = await materialize(worker="wrk_gone")
    other = FACTORIES[engine_name](home)
    assert await other.collect({"wrk_test", "wrk_gone"}) == []
    assert await other.collect({"wrk_test"}) == [left.ref]
    await left.wait_lost()
    assert (await run(machine, "echo", "alive")).stdout == "alive\n"
    await other.close()
    await left.stop()
    assert await engine.collect({"wrk_test"}) == []


async def test_a_successor_inherits_what_a_dead_worker_left(
    engine_name: str, home: Path, materialize: Materialize, image: str, tmp_path: Path
) -> None:
    left: Machine = await materialize(worker="wrk_gone", claim=3)
    await left.put_source("code", tmp_path)
    process = await _start(left, "print('ready'); input(); print('over')", input=True)
    await _until(process, b"ready")
    later, late = FACTORIES[engine_name](home), FACTORIES[engine_name](home)
    assert await later.inherit("wrk_2", {"wrk_test", "wrk_gone"}) == []
    (found,) = await later.inherit("wrk_2", {"wrk_test"})
    assert await later.inherit("wrk_2", {"wrk_test", "wrk_2"}) == [], "once"
    assert (found.former, found.machine.workspace_id, found.machine.sources()) == (
        "wrk_gone",
        left.workspace_id,
        {"code"},
    )
    assert await asyncio.wait_for(left.wait_lost(), 30), "the one before is displaced"
    found.machine.claimed(8)
    assert await later.collect({"wrk_test", "wrk_2"}) == []
    with pytest.raises(Unavailable, match="another worker"):
        await late.materialize(MachineSpec(workspace_id=left.workspace_id, worker_id="wrk_late", image=image, claim=7))
    again = found.processes[process.id]
    again.feed(b"\n")
    said = [frame async for frame in again.frames()]
    assert b"".join(f.data for f in said if isinstance(f, Output)) == b"ready\nover\n", "all that was not acknowledged"
    assert said[-1] == Exited(exit_code=0)
    assert (await run(found.machine, "echo", "alive")).stdout == "alive\n"
    await found.machine.stop()
    await later.close()
    await late.close()


async def test_what_nobody_inherited_yet_may_be_spared(engine_name: str, home: Path, materialize: Materialize) -> None:
    left: Machine = await materialize(worker="wrk_gone")
    other = FACTORIES[engine_name](home)
    assert await other.collect({"wrk_test"}, spare_running=True) == []
    assert (await run(left, "echo", "alive")).stdout == "alive\n"
    assert await other.collect({"wrk_test"}) == [left.ref]
    await other.close()
    await left.stop()


async def test_an_engine_says_what_it_is(engine: Engine, engine_name: str, home: Path) -> None:
    info = await engine.check()
    assert (info.name, info.isolated) == (engine_name, engine_name == "docker")
    assert info.host.startswith((home / "host-id").read_text().strip())
    said: list[str] = []
    await engine.ensure_image(ImageSpec(), said.append)
    if engine_name == "process":
        assert "no isolation" in " ".join(info.notes)
        await engine.ensure_image(ImageSpec(steps=(("apt", "git"),)), said.append)
        assert "ignores" in said[-1]


async def test_a_network_policy_is_kept_or_refused(engine: Engine, engine_name: str, image: str) -> None:
    spec = MachineSpec(workspace_id=ids.new("ws"), worker_id="wrk", image=image, network="none")
    if engine_name == "process":
        with pytest.raises(UsageError, match="network policy"):
            await engine.materialize(spec)
        return
    machine = await engine.materialize(spec)
    listing = await run(machine, "python3", "-c", "import os; print(os.listdir('/sys/class/net'))")
    assert listing.stdout == "['lo']\n"
    await engine.delete(spec.workspace_id)
