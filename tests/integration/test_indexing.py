"""Indexing a task project in a child process: what is found, and how every kind of broken module is told."""

from __future__ import annotations

import os
import select
import textwrap
import time
from pathlib import Path

import msgspec
import pytest

from helmr import ProjectError
from helmr.index import Index, RetryEntry, SecretEntry
from helmr.indexing import index_archive, index_project
from helmr.project import pack
from helmr.scaffold import write_project

EXAMPLES = Path(__file__).parents[2] / "examples"

FULL = '''
from __future__ import annotations

from dataclasses import dataclass

from helmr import Image, Queue, Retry, Sandbox, Secret, streams, task


@dataclass
class Review:
    pr: int


box = Sandbox("reviewer", image=Image("debian:12").apt("git"), cpu=1, memory="1GiB", network=["api.example.com"])
notes = streams.output("notes", schema=dict[str, int])
approval = streams.input("approval", schema=Review)


@task(
    "review-pr", sandbox=box, max_duration="15m", secrets=[Secret("TOKEN"), Secret("key", file="/run/secrets/key")],
    retry=Retry(max_attempts=3, min_delay="2s", codes=["task_error"]), queue=Queue("reviews", concurrency=4),
    park_after="2m", ttl="1h", cancel_grace=3, on_worker_lost="fail",
)
def review_pr(payload: Review, ctx) -> dict[str, int]:
    """Review a pull request.

    More words.
    """
    return {}


@task
async def plain(payload: Review | None = None):
    print("never executed here")
'''


def write(root: Path, files: dict[str, str] | None = None, **modules: str) -> Path:
    """Write files by path, and modules by name, into ``root``."""
    for name, text in {**(files or {}), **{f"{name}.py": text for name, text in modules.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


def test_everything_declared_is_in_the_index(tmp_path: Path) -> None:
    index = index_project(write(tmp_path, tasks=FULL), ["tasks"])
    assert [each.id for each in index.tasks] == ["plain", "review-pr"]
    review = index.task("review-pr")
    assert review is not None
    assert (review.module, review.name, review.file, review.line) == ("tasks", "review_pr", "tasks.py", 19)
    assert review.doc == "Review a pull request."
    assert review.payload_schema is not None
    assert review.payload_schema["$defs"]["Review"]["required"] == ["pr"]
    assert review.output_schema == {"type": "object", "additionalProperties": {"type": "integer"}}
    assert (review.sandbox, review.queue, review.max_duration, review.ttl) == ("reviewer", "reviews", 900, 3600)
    assert (review.park_after, review.cancel_grace, review.on_worker_lost) == (120, 3, "fail")
    assert review.retry == RetryEntry(
        max_attempts=3, min_delay=2, max_delay=30, factor=2, jitter=True, codes=("task_error",)
    )
    assert review.secrets == (SecretEntry(name="TOKEN", env="TOKEN"), SecretEntry(name="key", file="/run/secrets/key"))
    plain = index.task("plain")
    assert plain is not None
    assert (plain.sandbox, plain.output_schema, plain.retry) == ("default", None, None)
    assert plain.payload_schema is not None
    assert {"type": "null"} in plain.payload_schema["anyOf"]
    assert [(each.name, each.network) for each in index.sandboxes] == [
        ("default", "internet"),
        ("reviewer", ("api.example.com",)),
    ]
    assert index.sandboxes[1].image.steps == (("apt", "git"),)
    assert [(each.name, each.concurrency) for each in index.queues] == [("reviews", 4)]
    assert [(each.name, each.direction) for each in index.streams] == [("approval", "input"), ("notes", "output")]
    assert msgspec.json.decode(msgspec.json.encode(index), type=Index) == index


def test_the_same_project_gives_the_same_index_anywhere(tmp_path: Path) -> None:
    root = write(tmp_path / "project", tasks=FULL)
    here, there = index_project(root, ["tasks"]), index_archive(pack(root), ["tasks"])
    assert here == there
    assert not list(root.rglob("__pycache__"))


def test_fingerprints_follow_what_a_sandbox_is_not_its_name(tmp_path: Path) -> None:
    source = """
        from helmr import Sandbox, task
        a, b, c = Sandbox("a"), Sandbox("b"), Sandbox("c", cpu=1)
        @task
        def t(): ...
    """
    prints = {each.name: each.fingerprint for each in index_project(write(tmp_path, tasks=source), ["tasks"]).sandboxes}
    assert len(prints["a"]) == 64
    assert prints["a"] == prints["b"] == prints["default"]
    assert prints["c"] != prints["a"]


def one(name: str) -> str:
    return f"from helmr import task\n@task('{name}')\ndef t(): ...\n"


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        (["tasks"], ["a"]),
        (["tasks.py"], ["a"]),
        (["pkg"], ["b", "c", "d"]),
        (["pkg.sub"], ["b", "d"]),  # importing it imports its package
        (["pkg/sub"], ["b", "d"]),
        (["folder"], ["e", "f"]),
        (["folder.nested"], ["f"]),
        (["tasks", "pkg", "folder", "tasks"], ["a", "b", "c", "d", "e", "f"]),
    ],
)
def test_modules_packages_and_folders(tmp_path: Path, modules: list[str], found: list[str]) -> None:
    files = {
        "pkg/__init__.py": one("b"),
        "pkg/more.py": "from pkg import sub\n" + one("c"),
        "pkg/sub/__init__.py": "",
        "pkg/sub/deep.py": one("d"),
        "folder/e.py": one("e"),
        "folder/nested/f.py": one("f"),
        "unrelated.py": "raise SystemExit",
    }
    assert [each.id for each in index_project(write(tmp_path, files, tasks=one("a")), modules).tasks] == found


TASK = "from helmr import task\n@task\n"

BROKEN = [
    ("import nowhere", "1: .*ModuleNotFoundError: No module named 'nowhere'", "install 'nowhere'"),
    ("x = 1\ndef broken(:\n", "2: .*SyntaxError: invalid syntax", ""),
    ("\n\n1 / 0", "3: .*ZeroDivisionError: division by zero", ""),
    ("import sys; sys.exit(3)", "1: .*SystemExit: 3", ""),
    ("import os\nos.environ['NO_SUCH_KEY']", "2: .*KeyError: 'NO_SUCH_KEY'", "without secrets"),
    (one("same") + one("same"), r"5: task 'same' is defined twice; .* tasks\.py:2", "another name"),
    (
        "from helmr import Sandbox\nSandbox('b')\nSandbox('b', cpu=1)",
        r"3: sandbox 'b' is defined in two ways; .* tasks\.py:2",
        "once",
    ),
    ("from helmr import Queue\nQueue('q')\nQueue('q', 1)", "3: queue 'q' is defined in two ways", "once"),
    (f"{TASK}def t(data): ...", "2: task 't': it takes 'data'", "payload"),
    (f"{TASK}def t(payload: complex): ...", "2: task 't': the payload type complex is not", "dataclass"),
    (f"{TASK}def t() -> set[complex]: ...", r"2: task 't': the return type set\[complex\] is not", "dataclass"),
    (f"{TASK}def t(payload: 'Lost'): ...", "2: task 't': the annotation of 'payload'", "module level"),
    (
        "from helmr import streams\nstreams.output('o', schema=complex)\n" + one("t"),
        "2: the schema of the stream 'o'",
        "dataclass",
    ),
    ("from helmr import Retry\nRetry(min_delay='soon')", "2: .*min_delay 'soon' is not a duration", "90s"),
]


@pytest.mark.parametrize(("source", "message", "hint"), BROKEN, ids=[each[0][-30:] for each in BROKEN])
def test_a_broken_module_is_told_with_file_and_line(tmp_path: Path, source: str, message: str, hint: str) -> None:
    with pytest.raises(ProjectError, match=rf"tasks\.py:{message}") as refused:
        index_project(write(tmp_path, tasks=source), ["tasks"])
    assert str(tmp_path) not in refused.value.message
    assert hint in (refused.value.hint or "")


def test_the_place_is_where_it_broke_not_where_it_was_imported(tmp_path: Path) -> None:
    write(tmp_path, tasks="import inner", inner="\nraise ValueError('too bad')")
    with pytest.raises(ProjectError, match=r"inner\.py:2: .*ValueError: too bad"):
        index_project(tmp_path, ["tasks"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; print('last words', flush=True); os._exit(9)", r"\(exit code 9\); it said: last words"),
        ("import os; os.kill(os.getpid(), 11)", r"\(signal 11\)"),
    ],
)
def test_a_module_that_ends_the_process_is_told(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ProjectError, match=message):
        index_project(write(tmp_path, tasks=source), ["tasks"])


def test_a_project_without_tasks_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="no task found in tasks") as refused:
        index_project(write(tmp_path, tasks="x = 1"), ["tasks"])
    assert "@helmr.task" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("task", "did you mean 'tasks'?"), ("zzz", "found here: jobs, tasks"), ("tasks.more", "found here")],
)
def test_a_missing_module_is_told(tmp_path: Path, name: str, hint: str) -> None:
    write(tmp_path, {"jobs/nightly.py": ""}, tasks="")
    with pytest.raises(ProjectError, match=f"no module, package or folder '{name}'") as refused:
        index_project(tmp_path, [name])
    assert hint in (refused.value.hint or "")


def test_a_module_that_python_already_has_is_told(tmp_path: Path) -> None:
    write(tmp_path, json=one("a"))
    with pytest.raises(ProjectError, match="Python has another of this name") as refused:
        index_project(tmp_path, ["json"])
    assert refused.value.hint == "rename yours"


def test_modules_that_shadow_the_standard_library_do_not_break_the_indexer(tmp_path: Path) -> None:
    write(
        tmp_path, tasks=one("a"), enum="raise RuntimeError", typing="raise RuntimeError", msgspec="raise RuntimeError"
    )
    assert index_project(tmp_path, ["tasks"]).task("a") is not None


def test_a_slow_module_and_all_it_started_are_ended(tmp_path: Path) -> None:
    source = """
        import os, subprocess, time
        child = subprocess.Popen(["sleep", "60"])
        with open(os.path.join(os.path.dirname(__file__), "pids"), "w") as out:
            out.write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    """
    write(tmp_path, tasks=source)
    started = time.monotonic()
    with pytest.raises(ProjectError, match="importing tasks took more than 2 seconds"):
        index_project(tmp_path, ["tasks"], timeout=2)
    assert time.monotonic() - started < 10
    for pid in (tmp_path / "pids").read_text().split():
        assert ended(int(pid))


def ended(pid: int) -> bool:
    """Whether the process, which has been killed, ends; it may still wait to be reaped by whoever adopted it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 30)[0])
    finally:
        os.close(process)


def test_what_modules_print_does_not_disturb(tmp_path: Path) -> None:
    noise = "import os, sys\nprint('{}' * 100_000)\nsys.stderr.write('x' * 1_000_000)\nos.write(1, b'\\xff')\n"
    assert index_project(write(tmp_path, tasks=noise + one("a")), ["tasks"]).task("a") is not None


def test_modules_are_imported_in_an_empty_folder(tmp_path: Path) -> None:
    write(tmp_path, tasks="import os\nassert os.listdir() == []\n" + one("a"))
    assert index_project(tmp_path, ["tasks"]).task("a") is not None
    assert not os.path.samefile(tmp_path, Path.cwd())  # noqa: PTH121


def test_a_file_left_out_by_an_ignore_rule_is_missed_at_once(tmp_path: Path) -> None:
    write(tmp_path, tasks="import secret_sauce\n" + one("a"), secret_sauce="")
    assert index_project(tmp_path, ["tasks"]).task("a") is not None
    with pytest.raises(ProjectError, match=r"tasks\.py:1: .*No module named 'secret_sauce'"):
        index_archive(pack(tmp_path, ["secret_*"]), ["tasks"])


@pytest.mark.parametrize(("example", "task"), [("hello", "hello"), ("codebase-report", "codebase-report")])
def test_the_examples_can_be_deployed(example: str, task: str) -> None:
    index = index_archive(pack(EXAMPLES / example), ["tasks"])
    assert [each.id for each in index.tasks] == [task]


def test_the_template_can_be_deployed(tmp_path: Path) -> None:
    write_project(tmp_path / "agents")
    assert [each.id for each in index_archive(pack(tmp_path / "agents"), ["tasks"]).tasks] == ["hello"]
