"""Templates: what runs of one module share when they are forked from a process that has imported it, and what they do not."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helmr.guest import tree
from worker.engine import Exited, MachineSpec, Message, Output, Process, ProcessSpec, Template
from worker.process_engine import ProcessEngine
from worker.process_machine import ProcessMachine

pytestmark = pytest.mark.anyio

_TASKS = """
import os, random, signal, sys, time
from helmr import logger, task
{import_time}
BORN = os.getpid()

@task("facts")
def facts(payload) -> dict:
    return {{"own": BORN == os.getpid(), "born": BORN, "parent": os.getppid(), "random": random.random(),
            "run": os.environ["HELMR_RUN_ID"], "secret": os.environ.get("TOKEN"),
            "ahead": getattr(sys.modules.get("ahead"), "BORN", None)}}

@task("meddle")
def meddle(payload) -> dict:
    assert os.getppid() == BORN, "only a template may be meddled with: its shim is out of reach only in a container"
    os.kill(os.getppid(), getattr(signal, payload["signal"]))
    print("done", flush=True)
    time.sleep(payload["seconds"])
    return {{"born": BORN}}

@task("leave")
def leave() -> dict:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    return {{"born": BORN}}

@task("later")
async def later() -> dict:
    import asyncio
    await asyncio.sleep(0)
    return {{"born": BORN}}
"""

_numbers = itertools.count(1)


class Outcome:
    """What one run said."""

    def __init__(self) -> None:
        self.out = self.err = b""
        self.messages: list[dict[str, Any]] = []
        self.exited = Exited()

    @property
    def output(self) -> dict[str, Any]:
        assert self.messages[-1]["op"] == "result", (self.messages, self.err, self.exited)
        result: dict[str, Any] = self.messages[-1]["output"]
        return result


class Site:
    """A machine with the source of one module in it."""

    def __init__(self, machine: ProcessMachine) -> None:
        self.machine = machine

    async def start(self, task: str, payload: Any = None, **options: Any) -> Process:
        ident = f"run_{next(_numbers)}"
        facts = {"run": {"id": ident}, "session": {}, "task": {"id": task}, "workspace": {}, "attempt": 1}
        order = {"module": "tasks", "task_id": task, "payload": payload, "ctx": facts}
        env = {"HELMR_RUN_ID": ident, "HELMR_TASK_ID": task}
        return await self.machine.start(
            ProcessSpec(id=ident, source="src", task=order, env=env, deadline=30.0, **options)
        )

    def make_template(self, *preload: str, patience: float = 60.0) -> None:
        private = ("HELMR_RUN_ID", "HELMR_TASK_ID")
        template = Template(source="src", module="tasks", private=private, preload=preload)
        self.machine._channel.make_template(template, patience)

    async def run(self, task: str = "facts", payload: Any = None, **options: Any) -> Outcome:
        return await self.finish(await self.start(task, payload, **options))

    async def finish(self, process: Process) -> Outcome:
        outcome = Outcome()
        async for frame in process.frames():
            match frame:
                case Output(stream="stdout"):
                    outcome.out += frame.data
                case Output():
                    outcome.err += frame.data
                case Message():
                    outcome.messages.append(frame.body)
                case Exited():
                    outcome.exited = frame
        return outcome


Make = Callable[..., Awaitable[Site]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    engine = ProcessEngine(tmp_path / "home")

    async def make(import_time: str = "", ahead: str = "") -> Site:
        spec = MachineSpec(workspace_id=f"ws_{next(_numbers)}", worker_id="wrk_test", image="none")
        machine = await engine.materialize(spec)
        tree = tmp_path / spec.workspace_id
        tree.mkdir()
        (tree / "tasks.py").write_text(_TASKS.format(import_time=import_time))
        (tree / "ahead.py").write_text(f"import os\nBORN = os.getpid()\n{ahead}\n")
        await machine.put_source("src", tree)
        return Site(machine)

    yield make
    await engine.close()


async def test_runs_in_a_row_are_forked_from_one_process_that_has_imported_their_module(make: Make) -> None:
    site = await make("print('imported')")
    runs = [await site.run() for _ in range(4)]
    outputs = [run.output for run in runs]
    assert {output["own"] for output in outputs} == {False}
    assert len({output["born"] for output in outputs}) == 1
    assert all(output["parent"] == output["born"] for output in outputs)
    assert [run.out for run in runs] == [b"imported\n", b"", b"", b""]
    assert len({output["run"] for output in outputs}) == 4
    assert (await site.run("later")).output == {"born": outputs[0]["born"]}


async def test_runs_at_the_same_time_do_not_share_a_template(make: Make) -> None:
    site = await make()
    processes = [await site.start("facts") for _ in range(4)]
    outputs = [(await site.finish(process)).output for process in processes]
    assert len({output["born"] for output in outputs}) == 4


async def test_a_template_can_be_made_before_there_is_a_run(make: Make) -> None:
    site = await make("print('imported')")
    site.make_template()
    first, second = [await site.run() for _ in range(2)]
    assert (first.output["own"], first.output["born"]) == (False, second.output["born"])
    assert (first.out, second.out) == (b"imported\n", b"")


async def test_imports_that_nobody_waits_for_are_given_up(make: Make, tmp_path: Path) -> None:
    pipe = repr(str(tmp_path / "pipe"))
    site = await make(f"print('imported')\nif not os.path.exists({pipe}):\n    os.mkfifo({pipe})\n    open({pipe})")
    site.make_template(patience=0.3)
    async with asyncio.timeout(60):
        # Until there are the zygote, a shim, and what waits below it; nothing tells when.
        while _alive(site) != 3 or not (tmp_path / "pipe").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await site.run()).out == b"imported\n"


@pytest.mark.parametrize("failure", ["import no_such_module", "os.environ['HELMR_RUN_ID']"])
async def test_a_template_that_cannot_be_made_ahead_is_not_missed(make: Make, failure: str) -> None:
    """What fails here fails the first time only, so that the run itself can tell."""
    first = "not os.path.exists('tried') and not open('tried', 'w').close()"
    site = await make(f"print('imported')\nif {first}:\n    {failure}")
    site.make_template()
    run = await site.run()
    assert run.output["run"]
    assert run.out == b"imported\n"


async def test_what_cannot_be_imported_ahead_is_told_by_the_first_runs(make: Make) -> None:
    site = await make(ahead="logger = __import__('helmr').logger; logger.info('hello')")
    site.make_template("ahead")
    runs = [await site.run(preload=("ahead",)) for _ in range(3)]  # the second one tries it without its own module
    told = b"helmr: no module is imported ahead: one asks, when it is imported, for what belongs to a single run\n"
    assert [run.err for run in runs] == [told, told, b""]
    assert all(run.output["own"] for run in runs)


async def test_random_numbers_differ(make: Make) -> None:
    site = await make()
    assert len({(await site.run()).output["random"] for _ in range(3)}) == 3


async def test_a_run_with_secrets_has_a_process_of_its_own(make: Make) -> None:
    site = await make()
    await site.run()
    kept = (await site.run(secrets={"TOKEN": "s3cr3t"})).output
    assert (kept["own"], kept["secret"]) == (True, "s3cr3t")
    later = (await site.run()).output
    assert (later["own"], later["secret"]) == (False, None)


async def test_what_is_imported_ahead_is_there_for_runs_with_secrets_too(make: Make) -> None:
    site = await make()
    secret = {"TOKEN": "s3cr3t"}
    runs = [(await site.run(preload=("ahead",), secrets=secret)).output for _ in range(2)]
    assert [run["secret"] for run in runs] == ["s3cr3t"] * 2
    assert [run["own"] for run in runs] == [True, True]  # its own module is imported with the secrets in place
    assert [run["ahead"] for run in runs] == [run["parent"] for run in runs]
    assert runs[0]["parent"] == runs[1]["parent"]
    plain = (await site.run(preload=("ahead",))).output
    assert (plain["own"], plain["ahead"], plain["secret"]) == (False, plain["parent"], None)


async def test_a_module_that_cannot_be_shared_leaves_what_is_imported_ahead(make: Make) -> None:
    site = await make("file = open(__file__)")
    first, *later = [(await site.run(preload=("ahead",))).output for _ in range(3)]
    assert (first["own"], first["ahead"]) == (True, None)
    assert all(run["own"] and run["ahead"] == run["parent"] for run in later)


async def test_a_module_that_cannot_be_imported_ahead_is_told_of_by_every_run(make: Make) -> None:
    site = await make(ahead="import no_such_module")
    for _ in range(2):
        run = await site.run(preload=("ahead", "json"))
        assert not run.output["own"]
        told = [message for message in run.messages if message["op"] == "log"]
        assert [(each["level"], each["fields"]["preload"]) for each in told] == [("warning", "ahead")]
        assert (
            "ahead could not be imported ahead: ModuleNotFoundError: No module named 'no_such_module'"
            in told[0]["message"]
        )


@pytest.mark.parametrize(
    ("ahead", "why"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "leaves a thread",
        ),
        ("os.environ.get('HELMR_RUN_ID')", "asks, when it is imported"),
        ("os.environ.get('TOKEN')", "asks, when it is imported"),
    ],
)
async def test_what_cannot_be_shared_is_not_imported_ahead(make: Make, ahead: str, why: str) -> None:
    site = await make(ahead=ahead)
    options: dict[str, Any] = {"preload": ("ahead",), "secrets": {"TOKEN": "s3cr3t"}}
    first, second = [await site.run(**options) for _ in range(2)]
    assert why in first.err.decode()
    assert first.err.startswith(b"helmr: no module is imported ahead: one ")
    assert second.err == b""
    assert [run.output["ahead"] for run in (first, second)] == [None, None]


async def test_threads_of_a_librarys_own_do_not_keep_it_from_being_imported_ahead(make: Make) -> None:
    native = "import _thread, threading; gate = _thread.allocate_lock(); gate.acquire()"
    native += "; _thread.start_new_thread(gate.acquire, ())"
    site = await make(ahead=native)
    runs = [(await site.run(preload=("ahead",))).output for _ in range(2)]
    assert [(run["own"], run["ahead"]) for run in runs] == [(False, run["parent"]) for run in runs]


@pytest.mark.parametrize(
    "import_time",
    [
        "RUN = os.environ['HELMR_RUN_ID']",
        "RUN = os.environ.get('HELMR_RUN_ID'); print(RUN)",
        "logger.info('hello')",
        "import threading; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "file = open(__file__)",
        "import subprocess; child = subprocess.Popen(['sleep', '60'])",
        "signal.signal(signal.SIGUSR1, lambda *_: None)",
    ],
)
async def test_a_module_that_cannot_be_shared_is_imported_by_every_run(make: Make, import_time: str) -> None:
    site = await make(f"print('imported')\n{import_time}")
    for _ in range(3):
        run = await site.run()
        assert run.output["own"]
        said = [line for line in run.out.decode().split() if line != "imported"]
        assert run.out.count(b"imported") == 1
        assert said in ([], [run.output["run"]])
        assert [m["message"] for m in run.messages if m["op"] == "log"] == ["hello"] * ("logger" in import_time)


@pytest.mark.parametrize("failure", ["1 / 0", "sys.exit(3)", "import no_such_module"])
async def test_a_module_that_cannot_be_imported_fails_every_run(make: Make, failure: str) -> None:
    site = await make(f"print('imported')\n{failure}")
    for _ in range(2):
        run = await site.run()
        assert run.messages[-1]["op"] == "error"
        assert run.out == b"imported\n"
        assert run.exited.exit_code == (3 if "exit" in failure else 1)


async def test_a_run_that_leaves_processes_behind_costs_its_template(make: Make) -> None:
    site = await make()
    left = (await site.run("leave")).output["born"]
    assert (await site.run("leave")).output["born"] != left
    async with asyncio.timeout(30):
        while _alive(site) > 4:  # noqa: ASYNC110  nothing tells when what was left behind has been cleared away
            await asyncio.sleep(0.01)


async def test_a_cancelled_run_costs_its_template(make: Make) -> None:
    site = await make()
    born = (await site.run()).output["born"]
    process = await site.start("meddle", {"signal": "SIGCONT", "seconds": 60})
    await process.cancel(5)
    outcome = await site.finish(process)
    assert outcome.exited.cause == "cancel"
    assert (await site.run()).output["born"] != born


async def test_a_task_outlives_its_template(make: Make) -> None:
    site = await make()
    born = (await site.run("meddle", {"signal": "SIGKILL", "seconds": 0.1})).output["born"]
    assert (await site.run()).output["born"] != born


async def test_a_template_that_was_stopped_goes_on(make: Make) -> None:
    site = await make()
    await site.run()
    outcome = await site.run("meddle", {"signal": "SIGSTOP", "seconds": 0.0})
    assert outcome.exited == Exited(exit_code=0)
    assert (await site.run()).output["born"] != outcome.output["born"]


async def test_a_template_that_is_killed_between_runs_is_made_anew(make: Make) -> None:
    site = await make()
    born = (await site.run()).output["born"]
    os.kill(born, signal.SIGKILL)
    outcomes = [await site.run() for _ in range(3)]
    assert outcomes[-1].output["born"] != born


async def test_idle_templates_are_few(make: Make) -> None:
    site = await make()
    for process in [await site.start("facts") for _ in range(8)]:
        await site.finish(process)
    # The zygote; for each of four templates a shim, itself, and a process that waits; for the one without, a shim and that.
    async with asyncio.timeout(20):
        while _alive(site) > 15:  # those that were let go may still be on their way
            assert (await site.run()).output


def _alive(site: Site) -> int:
    return len(tree.descendants([int(site.machine.ref)]))
