"""Where the files of a locally built base image come from: Debian packages, or else this machine's own Python.

Nothing here needs root, runs a maintainer script or changes the machine: apt works on private folders.
"""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from helmr.errors import ImageError
from worker.base_tree import Tree

#: Beside Python and the libraries it depends on: two shells, everyday tools in one static binary, pip, time zones, and
#: the C++ runtime that binary wheels expect.
_PACKAGES = ("dash", "bash", "busybox-static", "python3-pip-whl", "tzdata", "libstdc++6", "libgcc-s1")
#: Libraries of modules that hardly anyone imports (nis, dbm); what these depend on would double the image.
_UNWANTED = re.compile(r"libnsl|libtirpc|libdb5|libgdbm")
#: What a shell script takes for granted, copied from this machine where there are no packages to take it from.
_TOOLS = (
    "sh bash env cat cp mv rm ls mkdir rmdir ln chmod chown touch date echo printf head tail wc sort uniq cut tr tee sed"
    " grep find xargs awk id sleep true false test pwd uname basename dirname readlink tar gzip diff which"
)
_MODULES_LEFT_OUT = re.compile(r"(idlelib|turtledemo|tkinter|ensurepip|site-packages|dist-packages|config-.*)$")
_PIP = "#!/usr/bin/env python3\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n"
_TIMEOUT = 300.0


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What was gathered: Python's ``X.Y``, the folder of its modules, and a word for people on where it came from."""

    python: str
    modules: str
    origin: str


def gather(archive: Path, scratch: Path) -> Contents:
    """Write the tar archive of a base image to ``archive``; ``scratch`` is an empty folder to work in.

    Raises:
        ImageError: this machine has neither Debian packages nor a Linux Python to offer.
    """
    with tarfile.open(archive, "w") as out:
        tree = Tree(out)
        if has_debian_packages():
            contents = from_packages(tree, scratch)
        elif sys.platform == "linux":
            contents = from_host(tree)
        else:
            raise ImageError(
                f"no base image can be built on {platform.system()} without a registry",
                hint="make a registry reachable for the Docker engine, or load an image with `docker load`",
            )
        tree.system_files()
        return contents


def has_debian_packages() -> bool:
    """Whether this machine can fetch and unpack Debian packages."""
    return all(shutil.which(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))


def from_packages(tree: Tree, scratch: Path) -> Contents:
    """Python as the Debian or Ubuntu release of this machine has it."""
    apt = Apt(scratch)
    version, names = apt.python_packages()
    debs = apt.download([*names, *_PACKAGES])
    for deb in debs:
        tree.package(io.BytesIO(_run(["dpkg-deb", "--fsys-tarfile", str(deb)])))
    for name, target in (("python3", f"python{version}"), ("python", "python3"), ("sh", "dash")):
        tree.link(f"usr/bin/{name}", target)
    _add_pip(tree, debs, "usr/lib/python3/dist-packages")
    return Contents(python=version, modules=f"/usr/lib/python{version}", origin=f"{len(debs)} Debian packages")


def from_host(tree: Tree) -> Contents:
    """The Python that runs this very code, its modules and the libraries it is linked with, at the same paths."""
    program = Path(sys.executable).resolve()
    modules = Path(sysconfig.get_path("stdlib"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    files = list(_module_files(modules))
    tools = [Path(found) for tool in _TOOLS.split() if (found := shutil.which(tool, path="/usr/bin:/bin"))]
    binaries = [program, *(tool.resolve() for tool in tools), *(path for path in files if path.suffix == ".so")]
    for path in (*files, *tools, program, *_linked_libraries(binaries)):
        tree.host_path(path)
    for name, target in ((f"python{version}", str(program)), ("python3", str(program)), ("python", "python3")):
        tree.link(f"usr/local/bin/{name}", target)
    bundled = [*modules.glob("ensurepip/_bundled/pip-*.whl"), *Path("/usr/share/python-wheels").glob("pip-*.whl")]
    if bundled:
        tree.wheel(io.BytesIO(bundled[0].read_bytes()), str(modules / "site-packages").lstrip("/"))
        tree.file("usr/local/bin/pip", _PIP.encode(), 0o755)
    return Contents(python=version, modules=str(modules), origin=f"this machine's {program}")


class Apt:
    """apt with its folders below ``scratch``, so that neither root nor the machine's own package lists are needed."""

    def __init__(self, scratch: Path) -> None:
        self._folder = scratch / "apt"
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (self._folder / name).mkdir(parents=True)
        settings = (
            f"Dir::Cache={self._folder / 'cache'}",
            "Dir::Cache::pkgcache=pkgcache.bin",  # Debian's container images switch these two off; each call costs 0.6 s then
            "Dir::Cache::srcpkgcache=srcpkgcache.bin",
            "APT::Sandbox::User=root",
        )
        self._options = [word for setting in settings for word in ("-o", setting)]
        self._fresh = False

    def python_packages(self) -> tuple[str, list[str]]:
        """Python's version ``X.Y`` in this release, and the names of its packages and their libraries."""
        text = self._query("depends", "python3-minimal")
        found = re.search(r"Depends: python(3\.\d+)-minimal", text)
        if found is None:
            self._refresh()
            return self.python_packages()
        version = found.group(1)
        parts = ("python{}-minimal", "libpython{}-minimal", "libpython{}-stdlib", "libpython{}-testsuite")
        names = [part.format(version) for part in parts]
        libraries = re.findall(r"Depends: (lib[\w.+-]+|zlib1g)", self._query("depends", "--important", *names))
        return version, [*names, *sorted({name for name in libraries if not _UNWANTED.match(name)} - set(names))]

    def download(self, names: list[str]) -> list[Path]:
        """Fetch these packages; out-of-date lists are fetched anew, once."""
        try:
            self._run("apt-get", "download", *names)
        except ImageError:
            self._refresh()
            self._run("apt-get", "download", *names)
        return sorted((self._folder / "debs").glob("*.deb"))

    def _refresh(self) -> None:
        if self._fresh:
            raise ImageError(
                "the Debian package lists do not have what a base image needs", hint="see /etc/apt/sources.list"
            )
        self._fresh = True
        self._options += ["-o", f"Dir::State::lists={self._folder / 'lists'}"]
        self._run("apt-get", "update")

    def _query(self, *arguments: str) -> str:
        try:
            return self._run("apt-cache", *arguments)
        except ImageError:
            return ""

    def _run(self, program: str, *arguments: str) -> str:
        return _run([program, *self._options, *arguments], cwd=self._folder / "debs").decode(errors="replace")


def _run(command: list[str], cwd: Path | None = None) -> bytes:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=True, timeout=_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        log = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace")
        raise ImageError(
            f"the base image cannot be built from Debian packages: `{command[0]}` failed",
            hint="make a registry or the Debian package archive reachable from this machine",
            details={"log": "\n".join(log.splitlines()[-30:])},
        ) from error
    return done.stdout


def _add_pip(tree: Tree, debs: list[Path], folder: str) -> None:
    deb = next(path for path in debs if path.name.startswith("python3-pip-whl_"))
    with tarfile.open(fileobj=io.BytesIO(_run(["dpkg-deb", "--fsys-tarfile", str(deb)]))) as files:
        name = next(name for name in files.getnames() if re.search(r"/pip-[^/]*\.whl$", name))
        wheel = files.extractfile(name)
        tree.wheel(io.BytesIO(wheel.read() if wheel else b""), folder)
    for name in ("pip", "pip3"):
        tree.file(f"usr/local/bin/{name}", _PIP.encode(), 0o755)


def _module_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _MODULES_LEFT_OUT.match(path.name) and path.name != "__pycache__":
            yield from _module_files(path)
        elif path.is_file() and path.suffix in {".py", ".so", ".txt", ""}:
            yield path


def _linked_libraries(binaries: list[Path]) -> Iterator[Path]:
    """The shared libraries of these programs and modules, and the loader, as ``ldd`` lists them."""
    listing = subprocess.run(
        ["ldd", *map(str, binaries)], capture_output=True, text=True, check=False, timeout=_TIMEOUT
    )
    for found in sorted(set(re.findall(r"(/\S+) \(0x", listing.stdout))):
        yield Path(found)
