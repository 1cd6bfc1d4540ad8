"""One step of an image that is given secrets: a command in a container of its own, which is then committed.

The engine's builder has no place for secrets that the API can reach: what it is given ends up in a layer or in the history. So
the values go to the command's shell by its standard input, which nothing keeps: they are in no layer, no label, no
``docker inspect``, no argument and on no disk. The shell makes them variables of the command, and of nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from docker import APIClient
from docker.types import LogConfig
from docker.utils.socket import frames_iter

from helmr.errors import ImageError
from helmr.sandbox import SECRET_RUN, step_variables
from helmr.secret_targets import env_problem
from worker.container_spec import INSTALL, KIND
from worker.docker_api import DockerApi, remove_container
from worker.docker_build import BuildLog
from worker.masking import Masker

#: The label of containers that such a step runs in.
BUILD = "build"
#: For each variable: one line of input, in which backslashes and line breaks are escaped. ``.`` keeps a break at its end.
_RECEIVE = 'IFS= read -r {0} || exit 125; {0}=$(printf "%b." "${0}"); {0}=${{{0}%.}}; export {0}\n'
_EXECUTE = 'exec /bin/sh -c "$0" </dev/null'


class SecretStep(msgspec.Struct, frozen=True, kw_only=True):
    """A command, and which secret is put into which variable; :meth:`helmr.Image.run` records it."""

    command: str
    variables: dict[str, str]

    @classmethod
    def parse(cls, step: tuple[str, ...]) -> SecretStep:
        """The step that a deployment names.

        Raises:
            ImageError: it is none.
        """
        _, *arguments = step
        variables = step_variables(arguments[1:])
        problems = [problem for name in variables if (problem := env_problem(name))]
        if len(variables) != len(arguments) - 1 or not variables or problems:
            raise ImageError(f"an image step is not understood: {problems[0] if problems else list(step)!r}")
        return cls(command=arguments[0], variables=variables)

    @property
    def text(self) -> str:
        """What makes the result what it is: the command and the names, but not the values."""
        return json.dumps([SECRET_RUN, self.command, sorted(self.variables.items())])

    @property
    def script(self) -> str:
        """What the shell does before the command."""
        return "".join(_RECEIVE.format(name) for name in self.variables) + _EXECUTE

    def input(self, values: Mapping[str, str]) -> bytes:
        """What the script reads."""
        lines = [values[secret].replace("\\", "\\\\").replace("\n", "\\n") for secret in self.variables.values()]
        return "".join(f"{line}\n" for line in lines).encode()


class Made(NamedTuple):
    """What is to be made: an image of this name with these labels, and whose the container is meanwhile."""

    tag: str
    labels: dict[str, str]
    install: str


async def execute(
    api: DockerApi,
    step: SecretStep,
    values: Mapping[str, str],
    *,
    base: dict[str, Any],
    made: Made,
    log: BuildLog,
) -> None:
    """Make an image of ``base`` (as the engine describes it) by running the step on it.

    Raises:
        ImageError: the command failed, with the end of what it wrote, masked, in ``details["log"]``.
        EngineUnavailable: the engine went away meanwhile.
    """
    async with _container(api, step, base["Id"], {INSTALL: made.install, KIND: BUILD, **made.labels}) as ref:
        await _converse(api, ref, step.input(values), Masker(values.values()), log)
        code: int = (await api.call(lambda client: client.wait(ref)))["StatusCode"]
        if code != 0:
            raise ImageError(
                f"the image cannot be built: the command of a step with secrets ended with exit code {code}",
                hint="see its output below, and Image.run(…, secrets=…) of the sandbox",
                details={"log": log.tail},
            )
        config = _config(base["Config"], made.labels)
        name, _, version = made.tag.partition(":")
        await api.call(lambda client: client.commit(ref, name, version, conf=config))


@contextlib.asynccontextmanager
async def _container(api: DockerApi, step: SecretStep, image: str, labels: dict[str, str]) -> AsyncIterator[str]:
    def create(client: APIClient) -> str:
        ref: str = client.create_container(
            image,
            entrypoint=["/bin/sh", "-c", step.script, step.command],
            labels=labels,
            stdin_open=True,
            healthcheck={"test": ["NONE"]},
            host_config=client.create_host_config(log_config=LogConfig(type="none")),
        )["Id"]
        return ref

    ref = await api.call(create)
    try:
        yield ref
    finally:
        await asyncio.shield(remove_container(api, ref))


async def _converse(api: DockerApi, ref: str, given: bytes, masker: Masker, log: BuildLog) -> None:
    """Start the container, give it what it reads, and take in what it writes."""

    def request(client: APIClient) -> Iterator[dict[str, Any]]:
        attached = client.attach_socket(ref, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        connection: socket.socket = attached._sock  # noqa: SLF001  # the SDK's own is for reading alone
        try:
            client.start(ref)
            connection.sendall(given)
            masked = masker.stream()
            yield from _lines((masked.feed(data) for _, data in frames_iter(attached, tty=False)), masked.end)
        finally:
            attached.close()  # lets go of the connection, and the other one closes it
            connection.close()

    talking = asyncio.create_task(api.stream(request, log))
    try:
        await asyncio.shield(talking)
    except asyncio.CancelledError:
        await remove_container(api, ref)  # which ends the conversation
        await asyncio.wait({talking})
        raise


def _lines(pieces: Iterable[bytes], rest: Callable[[], bytes]) -> Iterator[dict[str, Any]]:
    """Whole lines of what comes in pieces, in the form that the engine's builder has for them."""
    held = b""
    for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            yield {"stream": line.decode(errors="replace")}
    yield {"stream": (held + rest()).decode(errors="replace")}


def _config(base: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """The configuration of the image that was built on, which a commit would replace with the container's."""
    own = dict.fromkeys((INSTALL, KIND), "")  # of the container; what is made from the image must not look like it
    kept = {key: base.get(key) for key in ("User", "Env", "Cmd", "WorkingDir", "Volumes", "ExposedPorts")}
    return {
        **kept,
        "Entrypoint": base.get("Entrypoint") or [],
        "Labels": {**(base.get("Labels") or {}), **own, **labels},
    }
