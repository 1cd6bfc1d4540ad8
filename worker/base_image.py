"""The base image that stands in for ``python:3.x`` where no registry answers: built on this machine, once, then reused."""

from __future__ import annotations

import asyncio
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from docker import APIClient

from helmr.errors import HelmrError, ImageError, NotFound
from worker import base_sources
from worker.base_tree import CA_BUNDLE
from worker.docker_api import DockerApi
from worker.docker_build import archive, build
from worker.engine import Progress

#: Raised whenever the recipe changes, so that an image of the older recipe is not taken for the new one.
RECIPE = 2

_COVERED = re.compile(
    r"(docker\.io/)?(library/)?python(:3(\.\d+)*(-slim)?(-(bookworm|trixie|bullseye))?|:latest|:slim)?"
)

_DOCKERFILE = """\
FROM {layer}
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8{certificates}
RUN {busybox}python3 -m compileall -q -j 0 -x '/tests?/' {modules} && python3 -c "import {smoke}"
CMD ["python3"]
"""
_CERTIFICATES = "".join(f" {name}=/{CA_BUNDLE}" for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"))
#: Modules that each need a library of their own: a missing one must fail the build, not somebody's task.
_SMOKE = "asyncio, bz2, ctypes, hashlib, json, lzma, sqlite3, ssl, uuid, zlib"


def covers(base: str) -> bool:
    """Whether the stand-in serves for this base: Python itself, in any 3.x version, and no other image."""
    return _COVERED.fullmatch(base) is not None


def tag() -> str:
    """The stand-in's name on this machine, e.g. ``helmr/base:debian-12-r2``; building nothing, asking nobody."""
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    packages = base_sources.has_debian_packages()
    name = f"{release.get('ID', 'linux')}-{release.get('VERSION_ID', '0')}" if packages else "host-python"
    return f"helmr/base:{re.sub('[^a-z0-9.-]', '-', name.lower())}-r{RECIPE}"


async def ensure(api: DockerApi, progress: Progress) -> str:
    """The stand-in's name, after building it if it is not there yet (some five seconds).

    Raises:
        ImageError: it cannot be built on this machine.
    """
    if (found := await find(api)) is not None:
        return found
    name = tag()
    started = time.monotonic()
    scratch = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="helmr-base-"))
    try:
        contents = await asyncio.to_thread(base_sources.gather, scratch / "layer.tar", scratch)
        layer = await api.call(lambda client: _import(client, scratch / "layer.tar"))
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch)
    text = _dockerfile(layer, contents)
    labels = {"helmr.base": str(RECIPE), "helmr.python": contents.python}
    await build(api, archive({"Dockerfile": text.encode()}), tag=name, labels=labels, progress=lambda _: None)
    size = await api.call(lambda client: client.inspect_image(name)["Size"])
    progress(
        f"built {name} in {time.monotonic() - started:.1f}s: Python {contents.python} from {contents.origin},"
        f" {size / 1e6:.0f} MB"
    )
    return name


async def find(api: DockerApi) -> str | None:
    """The stand-in that the engine has, whichever machine or container made it; None if there is none."""
    labelled = {"label": f"helmr.base={RECIPE}"}
    images = await api.call(lambda client: client.images(filters=labelled))
    # Images built upon a stand-in inherit its label, but not its name.
    names = {name for image in images for name in image["RepoTags"] or () if name.startswith("helmr/base:")}
    return tag() if tag() in names else min(names, default=None)


async def exists(api: DockerApi, name: str) -> bool:
    """Whether the engine has an image by this name.

    Raises:
        ImageError: it cannot be a name.
    """
    try:
        await api.call(lambda client: client.inspect_image(name))
    except NotFound:
        return False
    except HelmrError as error:
        if error.details.get("status") != 400:
            raise
        raise ImageError(f"{name!r} is not an image name", hint="e.g. python:3.12-slim") from error
    return True


def _dockerfile(layer: str, contents: base_sources.Contents) -> str:
    return _DOCKERFILE.format(
        layer=layer,
        certificates=_CERTIFICATES if Path("/", CA_BUNDLE).is_file() else "",
        busybox="{ busybox --install -s 2>/dev/null; } && " if base_sources.has_debian_packages() else "",
        modules=contents.modules,
        smoke=_SMOKE,
    )


def _import(client: APIClient, layer: Path) -> str:
    answer = [json.loads(line) for line in client.import_image(str(layer)).splitlines() if line.strip()]
    identity = str(answer[-1].get("status", "")) if answer else ""
    if not identity.startswith("sha256:"):
        raise ImageError("the engine cannot import the base image", details={"log": json.dumps(answer)})
    return identity


async def _main() -> None:
    api = DockerApi()
    try:
        print(await ensure(api, lambda text: print(text, file=sys.stderr)))  # noqa: T201 - a command's output
    finally:
        await api.close()


if __name__ == "__main__":
    asyncio.run(_main())
