"""One run of the engine's image builder: the context goes in, progress comes out, a failure shows the end of the log.

This is the classic builder, the only one the SDK can drive; it needs no registry for a frontend and no extra program.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import deque
from typing import Any

from helmr.errors import HelmrError, ImageError
from worker.docker_api import DockerApi
from worker.engine import Progress

#: Lines of the builder's output that a failure carries.
LOG_LINES = 30

#: The builder paints what a step writes to stderr.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"Step \d+/\d+ : (.*)", re.DOTALL)


class BuildLog:
    """Follows the builder's output: reports each step, keeps the last lines and the error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self.error: str | None = None

    def __call__(self, item: dict[str, Any]) -> None:
        """Take in one JSON object of the stream."""
        if "error" in item:
            self.error = str(item["error"]).strip()
        text = _COLOUR.sub("", str(item.get("stream") or item.get("status") or item.get("error") or "")).strip()
        if text:
            self._lines += text.splitlines()
        if _STEP.match(text):
            self._progress(text if len(text) <= 120 else text[:117] + "...")

    @property
    def tail(self) -> str:
        """The last lines of the output."""
        return "\n".join(self._lines)


async def build(api: DockerApi, context: bytes, *, tag: str, labels: dict[str, str], progress: Progress) -> None:
    """Build and tag an image from a tar archive that has a ``Dockerfile``; nothing is left behind of a failed build.

    Raises:
        ImageError: a step failed, with the last lines of the output in ``details["log"]``.
        EngineUnavailable: the engine went away meanwhile.
    """
    log = BuildLog(progress)
    try:
        await api.stream(
            lambda client: client.build(
                fileobj=io.BytesIO(context),
                custom_context=True,
                tag=tag,
                labels=labels,
                rm=True,
                forcerm=True,
                decode=True,
            ),
            log,
        )
    except HelmrError as error:
        if type(error) is not HelmrError and error.code != "not_found":
            raise
        log.error = error.message  # the engine refused the Dockerfile itself
    if log.error is not None:
        raise ImageError(
            f"the image cannot be built: {log.error.splitlines()[0]}",
            hint="see the builder's output below, and the Image(...) steps of the sandbox",
            details={"log": log.tail or log.error},
        )


def archive(files: dict[str, bytes]) -> bytes:
    """A build context of a few small files, the same bytes every time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, data in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            out.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
