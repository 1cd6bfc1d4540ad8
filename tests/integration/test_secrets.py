"""Secrets from the moment they are stored to the end of the run that used them; and that nothing else gets to see them."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import topology
from bus.keyring import KeyRing
from bus.services.secrets import ReleaseRequest
from bus.vault import Sealed, Vault
from helmr.errors import Conflict, HelmrError, NotFound, Unavailable, UsageError
from helmr.subjects import Scope
from tests.integration.platform import Platform, control_of, history, running, state_of, until, written

pytestmark = pytest.mark.anyio

TASKS = """
    import os, sys, time
    from pathlib import Path
    from helmr import Image, Sandbox, Secret, logger, metadata, task

    TOKEN = Secret("TOKEN")
    KEY = Secret("KEY", file="/run/secrets/key", mode=0o440)

    def key_file():
        return Path(os.environ.get("HELMR_SECRET_ROOT", "") + "/run/secrets/key")

    @task("tell", secrets=[TOKEN, KEY])
    def tell() -> dict:
        token, path = os.environ["TOKEN"], key_file()
        key = path.read_text()
        for letter in f"token {token} of stdout\\n":
            sys.stdout.write(letter)
            sys.stdout.flush()
        print("key", key, file=sys.stderr)
        logger.info(f"the token is {token}", key=key, nested={"list": [token]})
        metadata.set("token", token)
        return {"token": token, "lengths": [len(token), len(key)], "mode": path.stat().st_mode & 0o777, "at": str(path)}

    @task("fail", secrets=[TOKEN])
    def fail():
        raise ValueError("not with " + os.environ["TOKEN"])

    @task("hold", secrets=[TOKEN])
    def hold():
        print("begun", flush=True)
        time.sleep(30)

    BUILT = Sandbox("built", image=Image().run("pip install private", secrets=[Secret("PIP_TOKEN")]))

    @task("in-a-built-image", sandbox=BUILT, secrets=[TOKEN])
    def in_a_built_image() -> list:
        return sorted(name for name in os.environ if "TOKEN" in name)

    @task("plain")
    def plain() -> list:
        return [name for name in os.environ if name == "TOKEN"] + [str(key_file().exists())]
"""


@pytest.fixture
def value() -> str:
    return "s3cr3t-" + secrets.token_hex(12)


def _found_in(folder: Path, value: str) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if value.encode() in path.read_bytes()]


async def test_what_is_known_about_a_secret_does_not_include_its_value(platform: Platform, value: str) -> None:
    helmr = await platform.client("known")
    first = await helmr.secrets.set("TOKEN", value)
    second = await helmr.secrets.set("TOKEN", value + "2")
    assert (first.version, second.version, second.created_at) == (1, 2, first.created_at)
    assert second.updated_at > first.updated_at
    assert "@" in (second.updated_by or "")
    await helmr.secrets.set("A", value)
    assert [each.name for each in await helmr.secrets.list()] == ["A", "TOKEN"]
    assert await helmr.secrets.get("TOKEN") == second
    assert await (await platform.client("others")).secrets.list() == []
    assert (await helmr.secrets.delete("TOKEN")).version == 2
    with pytest.raises(NotFound, match="no secret TOKEN"):
        await helmr.secrets.get("TOKEN")
    with pytest.raises(NotFound):
        await helmr.secrets.delete("TOKEN")
    for name in ("a.b", "", "*", "a b"):
        with pytest.raises(UsageError, match="is not a secret name"):
            await helmr.secrets.set(name, value)


async def test_a_run_gets_its_secrets_and_tells_nobody(tmp_path: Path, value: str) -> None:
    async with running(tmp_path) as platform:
        helmr = await platform.project("tell", TASKS)
        await helmr.secrets.set("TOKEN", value)
        await helmr.secrets.set("KEY", f"{value}-key")
        started = await helmr.sessions.start("tell")
        run = await started.run.wait(timeout=30)
        assert run.status == "succeeded", run.failure
        assert run.output == {
            "token": "***",
            "lengths": [len(value), len(value) + 4],
            "mode": 0o440,
            "at": run.output["at"],
        }
        assert run.metadata == {"token": "***"}
        told = await written(helmr, run)
        assert told["stdout"] == b"token *** of stdout\n"
        assert told["stderr"] == b"key ***\n"
        line = msgspec.json.decode(told["log"])
        assert (line["message"], line["fields"]) == ("the token is ***", {"key": "***", "nested": {"list": ["***"]}})
        assert value not in msgspec.json.encode(await history(helmr, run)).decode()
        assert not Path(run.output["at"]).exists()
        plain = await (await helmr.sessions.start("plain", workspace=run.workspace_id)).run.result(timeout=30)
        assert plain == ["False"]
    assert _found_in(tmp_path, value) == []


async def test_a_failure_is_told_without_the_secret(platform: Platform, value: str) -> None:
    helmr = await platform.project("failing", TASKS)
    await helmr.secrets.set("TOKEN", value)
    run = await (await helmr.sessions.start("fail")).run.wait(timeout=30)
    assert run.failure is not None
    assert (run.failure.code, run.failure.message) == ("task_error", "not with ***")
    assert "not with ***" in run.failure.detail["traceback"]
    assert value.encode() not in msgspec.json.encode(await history(helmr, run))


async def test_a_secret_that_is_missing_is_refused_before_a_run_exists(platform: Platform) -> None:
    helmr = await platform.project("refused", TASKS)
    with pytest.raises(UsageError, match="task fail needs the secret TOKEN, which is not set") as refused:
        await helmr.sessions.start("fail")
    assert refused.value.hint == "store it: helmr secret set TOKEN"
    with pytest.raises(UsageError, match="needs the secret TOKEN, which is not set; nor is PIP_TOKEN"):
        await helmr.sessions.start("in-a-built-image")


async def test_a_secret_that_an_image_is_built_with_is_needed_at_start_and_not_given_to_the_task(
    platform: Platform, value: str
) -> None:
    helmr = await platform.project("built", TASKS)
    await helmr.secrets.set("TOKEN", value)
    with pytest.raises(UsageError, match="needs the secret PIP_TOKEN, which is not set"):
        await helmr.sessions.start("in-a-built-image")
    await helmr.secrets.set("PIP_TOKEN", value + "-2")
    run = await (await helmr.sessions.start("in-a-built-image")).run.wait(timeout=60)
    assert (run.output, run.secrets) == (["TOKEN"], ("TOKEN", "PIP_TOKEN"))


async def test_a_secret_that_went_missing_fails_the_run(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("gone", TASKS)
        await helmr.secrets.set("TOKEN", value)
        started = await helmr.sessions.start("fail")
        await helmr.secrets.delete("TOKEN")
        await platform.add_worker()
        run = await started.run.wait(timeout=30)
        assert run.failure is not None
        assert run.failure.code == "secret_missing"
        assert run.failure.detail["hint"] == "store it: helmr secret set TOKEN"


async def test_only_the_holder_of_the_lease_gets_values(platform: Platform, value: str) -> None:
    helmr = await platform.project("leased", TASKS)
    await helmr.secrets.set("TOKEN", value)
    run = (await helmr.sessions.start("hold")).run
    await until(helmr, run, "started")
    lease = (await state_of(platform, helmr, run)).lease
    service, scope = platform.control.secrets, Scope(*helmr.scope)

    async def ask(**changes: Any) -> dict[str, str]:
        fields = {"run_id": run.id, "worker": lease.worker, "lease": lease.cursor} | changes
        return (await service.release(scope, ReleaseRequest(**fields))).values

    assert await ask() == {"TOKEN": value}
    for changes in ({"worker": "wrk_other"}, {"lease": lease.cursor + 1}):
        with pytest.raises(Conflict, match="is not leased to"):
            await ask(**changes)
    await run.cancel(force=True)
    await run.wait(timeout=30)
    with pytest.raises(Conflict):
        await ask()


async def test_a_run_waits_for_control_to_come_back(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.project("away", TASKS)
        await helmr.secrets.set("TOKEN", value)
        run = (await helmr.sessions.start("fail")).run
        answers = asyncio.Event()
        release = platform.control.secrets.vault.values

        async def busy(scope: Scope, names: tuple[str, ...]) -> dict[str, str]:
            if not answers.is_set():
                answers.set()
                raise Unavailable("the bucket of secrets does not answer")
            return await release(scope, names)

        platform.control.secrets.vault.values = busy  # type: ignore[method-assign]
        await platform.add_worker()
        ended = await run.wait(timeout=30)
        assert ended.failure is not None
        assert (ended.failure.code, ended.dispatch_attempt) == ("task_error", 1)


# Keys


async def _sealed(platform: Platform, scope: Scope, name: str) -> Sealed:
    bucket = await platform.nc.jetstream().key_value(topology.SECRETS_BUCKET)
    return msgspec.json.decode((await bucket.get(f"{scope}.{name}")).value or b"", type=Sealed)


async def test_a_new_key_takes_over_even_when_it_was_interrupted(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.client("rotating")
        scope = Scope(*helmr.scope)
        for number in range(5):
            await helmr.secrets.set(f"S{number}", f"{value}{number}")
        before = (await helmr.secrets.get("S0")).key_id
        ring = platform.control.secrets.vault.ring
        key = ring.make()  # as a rotation does that dies right after
        await helmr.secrets.set("S4", f"{value}4")
        assert [(await helmr.secrets.get(f"S{number}")).key_id for number in (0, 4)] == [before, key.id]
        done = await helmr.secrets.rotate()
        assert (done.key_id, done.reencrypted) == (key.id, 4)
        assert [each.id for each in KeyRing.find(platform.home).known()] == [key.id]
        again = await helmr.secrets.rotate()
        assert again.key_id not in {before, key.id}
        assert again.reencrypted == 5
        found = await platform.control.secrets.vault.values(scope, tuple(f"S{number}" for number in range(5)))
        assert found == {f"S{number}": f"{value}{number}" for number in range(5)}
        assert [each.version for each in await helmr.secrets.list()] == [1, 1, 1, 1, 2]


async def test_a_value_moved_to_another_name_scope_or_version_does_not_decrypt(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.client("moving")
        scope = Scope(*helmr.scope)
        await helmr.secrets.set("MINE", value)
        sealed = await _sealed(platform, scope, "MINE")
        bucket = await platform.nc.jetstream().key_value(topology.SECRETS_BUCKET)
        vault = platform.control.secrets.vault
        forged = [
            (Scope("other", "test"), sealed),
            (scope, msgspec.structs.replace(sealed, name="YOURS")),
            (scope, msgspec.structs.replace(sealed, version=2)),
            (
                scope,
                msgspec.structs.replace(sealed, ciphertext=bytes([sealed.ciphertext[0] ^ 1, *sealed.ciphertext[1:]])),
            ),
        ]
        for where, entry in forged:
            await bucket.put(f"{where}.{entry.name}", msgspec.json.encode(entry))
            with pytest.raises(HelmrError, match="it was tampered with"):
                await vault.values(where, (entry.name,))


async def test_a_server_without_the_key_says_so_and_makes_no_other(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform:
        helmr = await platform.client("keyless")
        await helmr.secrets.set("TOKEN", value)
        stranger = Vault(platform.nc, KeyRing.find(tmp_path / "elsewhere"))
        with pytest.raises(HelmrError, match="which this server does not have"):
            await stranger.values(Scope(*helmr.scope), ("TOKEN",))
        with pytest.raises(HelmrError, match="this server has no secret key, but TOKEN"):
            await stranger.set(Scope(*helmr.scope), "OTHER", value, by=None)


async def test_writers_at_the_same_time_each_get_a_version(tmp_path: Path, value: str) -> None:
    async with running(tmp_path, workers=0) as platform, control_of(platform.server):
        helmr = await platform.client("racing")
        await helmr.secrets.set("TOKEN", value)
        stored = await asyncio.gather(*(helmr.secrets.set("TOKEN", f"{value}{n}") for n in range(8)))
        assert sorted(each.version for each in stored) == list(range(2, 10))
