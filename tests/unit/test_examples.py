"""The examples do what their READMEs say, on a small scale."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.task_process import REPOSITORY, run

EXAMPLES = REPOSITORY / "examples"


def test_hello(tmp_path: Path) -> None:
    told = run(tmp_path, "hello", {"name": "Ada"}, source_path=str(EXAMPLES / "hello"))
    assert told.last["output"] == {"greeting": "Hello, Ada!", "file": "hello.txt"}
    assert (tmp_path / "hello.txt").read_text() == "Hello, Ada!\n"


def test_codebase_report_survives_broken_files(tmp_path: Path) -> None:
    code, workspace = tmp_path / "code", tmp_path / "workspace"
    (code / "pkg").mkdir(parents=True)
    workspace.mkdir()
    (code / "pkg" / "good.py").write_text(
        "import os, json\nfrom . import x\n\nclass A:\n    async def f(self):\n        pass\n"
    )
    (code / "pkg" / "broken.py").write_text("def broken(:\n")
    (code / "pkg" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'ä'\n".encode("latin-1"))
    (code / "single.py").write_bytes(b"\xff\xfe not python")
    (code / "single.txt").write_text("not python either")
    told = run(workspace, "codebase-report", {"path": str(code)}, source_path=str(EXAMPLES / "codebase-report"))
    output = told.last["output"]
    assert (told.code, output["files"], output["errors"], output["packages"]) == (0, 4, 2, 2)
    assert (output["functions"], output["classes"], output["lines"]) == (1, 1, 8)
    assert output["longest_function"] == "f in pkg/good.py:5, 2 lines"
    records = [each["data"] for each in told.all("output")]
    assert [(each["package"], each["files"], each["errors"]) for each in records] == [("pkg", 3, 1), ("single", 1, 1)]
    assert records[0]["imports"] == {"os": 1, "json": 1}
    assert told.all("metadata")[-1]["metadata"]["phase"] == "done"
    assert json.loads((workspace / "report.json").read_text())["total"]["files"] == 4
    assert "| pkg | 3 | 8 | 1 | 1 |" in (workspace / "report.md").read_text()


def test_codebase_report_says_how_far_it_is(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for number in range(250):
        (code / f"m{number:03}.py").write_text("x = 1\n")
    told = run(tmp_path, "codebase-report", {"path": str(code)}, source_path=str(EXAMPLES / "codebase-report"))
    percents = [each["metadata"].get("percent") for each in told.all("metadata") if "percent" in each["changed"]]
    assert percents == [0, 40, 80, 100]
    assert [each["message"] for each in told.all("log")] == ["reading", "100 of 250 files", "200 of 250 files", "done"]


def test_codebase_report_of_nothing_fails(tmp_path: Path) -> None:
    told = run(tmp_path, "codebase-report", {"path": str(tmp_path)}, source_path=str(EXAMPLES / "codebase-report"))
    assert told.last["message"] == f"there is no Python file in {tmp_path}"
