"""``import helmr`` is quick, loads nothing else, and offers what it lists."""

from __future__ import annotations

import subprocess
import sys

import pytest

import helmr

_HEAVY = ("msgspec", "nats", "click", "pydantic", "asyncio", "inspect", "dataclasses", "typing", "re")


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    loaded = _python(f"import sys, helmr; print([name for name in {_HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_authoring_stays_within_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from helmr import Image, Queue, Retry, Sandbox, Secret, logger, metadata, step, streams, task, timers, tokens\n"
        "import helmr.guest.runner\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names) - {'helmr'}))"
    )
    assert _python(code) == "[]"


def test_what_runs_are_forked_from_loads_no_library_that_only_some_of_them_need() -> None:
    """Each one is mapped, copied and unmapped again with every process that is forked."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import helmr.guest.zygote, helmr.guest.runner\n"
        "some = {'base64', 'decimal', 'fcntl', 'random', 'shutil', 'tempfile', 'termios', 'uuid', 'zlib'}\n"
        "print(sorted((set(sys.modules) - before) & some))"
    )
    assert _python(code) == "[]"


@pytest.mark.parametrize("name", sorted(set(helmr.__all__) - {"Client", "AsyncClient"}))
def test_every_listed_name_exists(name: str) -> None:
    assert getattr(helmr, name) is not None


def test_the_list_is_sorted_and_complete() -> None:
    assert sorted(helmr.__all__) == helmr.__all__
    # A task that imports everything by star must not need what the clients need.
    assert dir(helmr) == sorted([*helmr.__all__, "AsyncClient", "Client", "now", "random", "uuid4"])


def test_the_decorator_stays_itself_whatever_is_imported() -> None:
    assert _python("import helmr, helmr.tasks, helmr.guest.runner; print(helmr.task.__name__)") == "task"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tsak'"):
        helmr.tsak  # noqa: B018
