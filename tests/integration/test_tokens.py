"""Tokens: made by tasks and from outside, completed once, and what becomes of runs that wait for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bus import capabilities
from bus.log import TOKEN
from helmr.client import AsyncClient
from helmr.errors import Conflict, NotFound, TooLarge, UsageError
from helmr.subjects import Scope
from tests.integration.history import history
from tests.integration.platform import Platform, kinds, until

pytestmark = pytest.mark.anyio

TASKS = """
    import helmr
    from helmr import metadata, task, tokens

    @task("make", park_after=0)
    def make(payload: dict) -> dict:
        token = tokens.create(timeout=payload.get("timeout", "1h"), tags=["review"], metadata={"for": "ada"})
        metadata.set("token", token.id)
        try:
            return {"id": token.id, "answer": token.wait(payload.get("wait"))}
        except helmr.WaitTimeout as late:
            return {"late": str(late)}
        except helmr.WaitCancelled as never:
            return {"never": str(never)}

    @task("take")
    def take(payload: str):
        return tokens.get(payload).wait()

    @task("secret", park_after=0)
    def secret():
        token = tokens.create()
        metadata.set("secret", helmr.step("hand over", lambda: token.secret()))
        return token.wait()
"""


async def _made(helmr: AsyncClient, payload: dict[str, object]) -> tuple[str, str]:
    started = await helmr.sessions.start("make", payload)
    made = await until(helmr, started.run, "token_created")
    return started.run.id, made.data["token"]


async def test_a_token_of_a_task_is_completed_once(helmr: AsyncClient) -> None:
    run, token = await _made(helmr, {})
    await until(helmr, run, "waiting")
    shown = await helmr.tokens.get(token)
    assert (shown.status, shown.run_id, shown.tags, shown.metadata) == ("pending", run, ("review",), {"for": "ada"})
    done = await helmr.tokens.complete(token, {"a": 1, "b": 2})
    assert (done.status, done.data) == ("completed", {"a": 1, "b": 2})
    assert await helmr.tokens.complete(token, {"b": 2, "a": 1}) == done
    with pytest.raises(Conflict, match="other data"):
        await helmr.tokens.complete(token, {"a": 1})
    with pytest.raises(Conflict, match="completed"):
        await helmr.tokens.cancel(token)
    ended = await helmr.runs.wait(run, timeout=30)
    assert ended.output == {"id": token, "answer": {"a": 1, "b": 2}}
    assert (await kinds(helmr, run)).count("token_created") == 1


async def test_a_cancelled_token_is_told_to_the_task(helmr: AsyncClient) -> None:
    run, token = await _made(helmr, {})
    await until(helmr, run, "waiting")
    await helmr.tokens.cancel(token, reason="no need")
    assert (await helmr.tokens.cancel(token)).status == "cancelled"
    ended = await helmr.runs.wait(run, timeout=30)
    assert ended.output == {"never": f"token {token} will never come: no need"}
    with pytest.raises(Conflict, match="cancelled"):
        await helmr.tokens.complete(token, 1)


@pytest.mark.parametrize("payload", [{"timeout": 0.2}, {"wait": 0.2}], ids=["token", "wait"])
async def test_time_runs_out(helmr: AsyncClient, payload: dict[str, object]) -> None:
    run, token = await _made(helmr, payload)
    ended = await helmr.runs.wait(run, timeout=30)
    assert ended.output == {"late": f"token {token} did not come in time"}
    status = (await helmr.tokens.get(token)).status
    assert status == ("pending" if "wait" in payload else "expired")


async def test_any_number_of_runs_wait_for_a_token_from_outside(helmr: AsyncClient) -> None:
    made = await helmr.tokens.create(timeout="1h", tags=["outside"])
    runs = [(await helmr.sessions.start("take", made.token.id)).run for _ in range(3)]
    await asyncio.gather(*(until(helmr, run, "waiting") for run in runs))
    await helmr.tokens.complete(made.token, "go")
    late = (await helmr.sessions.start("take", made.token.id)).run
    assert [await run.result(timeout=30) for run in (*runs, late)] == ["go"] * 4


async def test_a_token_that_does_not_exist_never_comes(helmr: AsyncClient) -> None:
    ended = await (await helmr.sessions.start("take", "tok_nothing")).run.wait(timeout=30)
    assert ended.failure is not None
    assert "there is no token tok_nothing" in ended.failure.message


async def test_the_history_lists_tokens_however_many(helmr: AsyncClient, platform: Platform, tmp_path: Path) -> None:
    made = [await helmr.tokens.create(tags=["listed", f"n{n}"]) for n in range(3)]
    await helmr.tokens.complete(made[1].token, 5)
    run = (await helmr.sessions.start("make", {})).run
    await until(helmr, run, "waiting")
    async with history(platform.nc, tmp_path / "h"):
        assert [each.id for each in await helmr.tokens.list(tag="listed")] == [each.token.id for each in reversed(made)]
        (done,) = await helmr.tokens.list(tag="listed", status="completed")
        assert (done.id, done.data) == (made[1].token.id, None)
        (own,) = await helmr.tokens.list(run=run.id)
        assert (own.run_id, own.status) == (run.id, "pending")
        assert len(await helmr.tokens.list(limit=1)) == 1
        assert await helmr.tokens.get(own.id[:-2]) == own
        assert (await helmr.tokens.complete("@last", "done")).id == own.id
    assert await run.result(timeout=30) == {"id": own.id, "answer": "done"}


async def test_what_exceeds_a_limit_is_refused(helmr: AsyncClient) -> None:
    with pytest.raises(UsageError, match="365 d"):
        await helmr.tokens.create(timeout="400d")
    with pytest.raises(TooLarge):
        await helmr.tokens.create(tags=["x" * 200])
    made = await helmr.tokens.create()
    with pytest.raises(TooLarge):
        await helmr.tokens.complete(made.token, "x" * 300_000)
    with pytest.raises(NotFound):
        await helmr.tokens.get("tok_01m8f0000000000000000000")


async def test_secrets_fit_their_token_alone(helmr: AsyncClient, platform: Platform) -> None:
    started = await helmr.sessions.start("secret")
    told = await until(helmr, started.run, "waiting")
    secret = (await helmr.runs.get(told.run_id)).metadata["secret"]
    token_id = secret.partition(".")[0]
    found = await platform.control.log.find(TOKEN, "tok", token_id)
    assert found is not None
    scope, event = found
    assert scope == Scope(*helmr.scope)
    assert capabilities.fits(secret, event.state.secrets)
    assert not capabilities.fits(secret + "x", event.state.secrets)
    assert not capabilities.fits((await helmr.tokens.create()).secret or "", event.state.secrets)
    assert secret not in str(event)
    await helmr.tokens.complete(token_id, "done")
    assert await started.run.result(timeout=30) == "done"
