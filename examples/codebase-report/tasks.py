"""A task that reads a whole code base and says how it is getting on."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from survey import Survey, package_of, source_files, survey_file, to_markdown

from helmr import Sandbox, TaskContext, UsageError, logger, metadata, streams, task

LOG_EVERY = 100


@dataclass
class Request:
    """Which folder to read; None: the standard library of the Python that runs the task."""

    path: str | None = None


class PackageRecord(TypedDict):
    """One record of the stream ``packages``."""

    package: str
    files: int
    errors: int
    lines: int
    functions: int
    classes: int
    imports: dict[str, int]


class Totals(TypedDict):
    """What the task returns."""

    path: str
    packages: int
    files: int
    errors: int
    lines: int
    functions: int
    classes: int
    longest_function: str
    seconds: float


box = Sandbox("reporter", cpu=2, memory="1GiB")
packages_stream = streams.output("packages", schema=PackageRecord)


@task("codebase-report", sandbox=box, max_duration="10m")
def codebase_report(ctx: TaskContext, payload: Request | None = None) -> Totals:
    """Parse every Python file of a code base and write a report into the workspace."""
    started = time.monotonic()
    root = str(Path(payload.path if payload and payload.path else Path(os.__file__).parent).resolve())
    metadata.patch({"phase": "looking for files", "files_done": 0, "percent": 0})
    files = source_files(root)
    if not files:
        raise UsageError(f"there is no Python file in {root}", hint="give a folder inside the container")
    logger.info("reading", path=root, files=len(files))
    metadata.patch({"phase": "parsing", "files": len(files)})
    packages = read_packages(root, files)
    metadata.set("phase", "writing")
    total = Survey()
    for each in packages.values():
        total.add(each)
    write_report(Path(ctx.workspace.path), root, total, packages)
    metadata.patch({"phase": "done", "percent": 100})
    totals = totals_of(root, total, packages, time.monotonic() - started)
    logger.info("done", **totals)
    return totals


def read_packages(root: str, files: list[str]) -> dict[str, Survey]:
    """Read all files, package by package, and say how far we are."""
    packages: dict[str, Survey] = {}
    done = 0
    for package, members in groupby(sorted(files, key=package_of), key=package_of):
        survey = packages[package] = Survey()
        for file in members:
            survey.add(survey_file(root, file))
            done += 1
            if done % LOG_EVERY == 0:
                logger.info(f"{done} of {len(files)} files", package=package)
                metadata.patch({"files_done": done, "percent": round(100 * done / len(files))})
        packages_stream.append(record_of(package, survey))
    metadata.set("files_done", done)
    return packages


def record_of(package: str, survey: Survey) -> PackageRecord:
    """What the stream ``packages`` tells about a package."""
    return {
        "package": package,
        "files": survey.files,
        "errors": survey.errors,
        "lines": survey.lines,
        "functions": survey.functions,
        "classes": survey.classes,
        "imports": dict(survey.imports.most_common(20)),
    }


def write_report(folder: Path, root: str, total: Survey, packages: dict[str, Survey]) -> None:
    """Write ``report.md`` and ``report.json``, and print the former."""
    report = to_markdown(root, total, packages)
    print(report)
    folder.joinpath("report.md").write_text(report, encoding="utf-8")
    details = {
        "path": root,
        "total": total.to_dict(),
        "packages": {name: each.to_dict() for name, each in packages.items()},
    }
    folder.joinpath("report.json").write_text(json.dumps(details, indent=1), encoding="utf-8")


def totals_of(root: str, total: Survey, packages: dict[str, Survey], seconds: float) -> Totals:
    """The totals in short."""
    longest = total.longest[0] if total.longest else None
    return {
        "path": root,
        "packages": len(packages),
        "files": total.files,
        "errors": total.errors,
        "lines": total.lines,
        "functions": total.functions,
        "classes": total.classes,
        "longest_function": f"{longest.name} in {longest.file}:{longest.line}, {longest.lines} lines"
        if longest
        else "",
        "seconds": round(seconds, 2),
    }
