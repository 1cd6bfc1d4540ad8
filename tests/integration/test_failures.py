"""Failures that are nobody's code: of the workspace, the image, the disk; each by its code, and none is retried."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NoReturn

import pytest

from helmr.client import AsyncClient
from helmr.errors import HelmrError, ImageError
from tests.integration.platform import kinds
from worker import messages
from worker.answers import Answers
from worker.process_engine import ProcessEngine
from worker.process_machine import ProcessMachine

pytestmark = pytest.mark.anyio

TASKS = """
    import os, signal, time
    from pathlib import Path
    from helmr import Retry, task, timers

    def _parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    @task("kills-its-shim")
    def kills_its_shim():
        os.kill(_parent(os.getppid()), signal.SIGKILL)
        time.sleep(60)

    @task("quick", retry=Retry(max_attempts=3, min_delay="0s"))
    def quick() -> int:
        return 1

    @task("naps")
    def naps() -> str:
        print("begun", flush=True)
        timers.sleep("100ms")
        return "rested"

    @task("broken")
    def broken():
        raise ValueError("no")
"""


def _full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_and_told(*_: object) -> NoReturn:
    try:
        _full()
    except OSError as error:
        raise HelmrError("cannot write below /srv", hint="free some space") from error


def _unwritable(*_: object) -> NoReturn:
    raise HelmrError("cannot write below /srv", hint="ask somebody")


def _no_image(*_: object) -> NoReturn:
    raise ImageError("no registry has it", hint="correct its name")


@pytest.mark.parametrize(
    ("owner", "method", "fault", "code", "words"),
    [
        (ProcessMachine, "put_source", _full, "disk_full", "No space left"),
        (ProcessEngine, "materialize", _full_and_told, "disk_full", "cannot write"),
        (ProcessEngine, "materialize", _unwritable, "workspace_error", "cannot write"),
        (ProcessEngine, "ensure_image", _no_image, "image_error", "no registry"),
    ],
)
async def test_it_fails_by_its_code_at_once(
    helmr: AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    *,
    owner: type,
    method: str,
    fault: object,
    code: str,
    words: str,
) -> None:
    async def raises(*arguments: object) -> None:
        fault(*arguments)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, raises)
        started = await helmr.sessions.start("quick")
        run = await started.run.wait(timeout=20)
    assert run.failure is not None
    assert (run.failure.code, run.failure.retryable, run.attempt) == (code, False, 1)
    assert words in run.failure.message
    assert await kinds(helmr, run) == ["queued", "leased", "failed"]
    again = await helmr.sessions.start("quick", workspace=run.workspace_id)
    assert (await again.run.wait(timeout=20)).output == 1, "the workspace is not to blame"


async def test_what_a_policy_may_act_on_says_so(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("broken")).run.wait(timeout=20)
    assert run.failure is not None
    assert (run.failure.code, run.failure.retryable) == ("task_error", True)


def test_every_code_is_explained() -> None:
    from helmr.events import FailureCode

    page = Path(__file__).parents[2] / "docs/reference/events.md"
    rows = [line for line in page.read_text().splitlines() if line.count("|") == 5 and line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == set(FailureCode.__args__)  # type: ignore[attr-defined]


async def test_a_run_that_ends_what_watches_over_it_is_dispatched_again_but_not_for_ever(helmr: AsyncClient) -> None:
    run = await (await helmr.sessions.start("kills-its-shim")).run.wait(timeout=30)
    assert run.failure is not None
    assert (run.failure.code, run.attempt, run.dispatch_attempt) == ("dispatch_exhausted", 1, 5)
    assert "ended together with its shim" in run.failure.message
    after = await (await helmr.sessions.start("quick", workspace=run.workspace_id)).run.wait(timeout=30)
    assert (after.status, after.dispatch_attempt) == ("succeeded", 1)


async def test_a_run_is_given_back_whole_when_its_worker_fails_at_what_nobody_foresaw(
    helmr: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = Answers.register, iter([RuntimeError("never seen before")])

    async def register(answers: Answers, message: messages.Wait) -> Any:
        for failure in failures:
            raise failure
        return await real(answers, message)

    monkeypatch.setattr(Answers, "register", register)
    started = await helmr.sessions.start("naps")
    assert await started.run.result(timeout=60) == "rested"
    assert "lease_lost" in await kinds(helmr, started.run)
    graves = [(chunk.dispatch, chunk.tombstone) async for chunk in helmr.runs.logs(started.run) if chunk.tombstone]
    assert graves == [(1, "worker_lost")]
