"""Measures Python source with ``ast``: plain functions over files, without anything of Helmr's."""

from __future__ import annotations

import ast
import io
import os
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

SKIPPED = {"__pycache__", "site-packages", "dist-packages", "node_modules"}

Functions = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Function:
    """One function and how many lines it has."""

    name: str
    file: str
    line: int
    lines: int


@dataclass
class Survey:
    """What was found in some files. Surveys of parts add up to the survey of the whole."""

    files: int = 0
    errors: int = 0
    lines: int = 0
    code_lines: int = 0
    functions: int = 0
    classes: int = 0
    longest: list[Function] = field(default_factory=list)
    imports: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As JSON; imports by how often they occur."""
        longest = [asdict(each) for each in self.longest]
        return {**vars(self), "longest": longest, "imports": dict(self.imports.most_common())}

    def add(self, other: Survey, *, keep: int = 10) -> None:
        """Add another survey; of the longest functions, the ``keep`` longest stay."""
        self.files += other.files
        self.errors += other.errors
        self.lines += other.lines
        self.code_lines += other.code_lines
        self.functions += other.functions
        self.classes += other.classes
        self.imports += other.imports
        self.broken += other.broken
        self.longest = sorted([*self.longest, *other.longest], key=lambda each: (-each.lines, each.file, each.line))[
            :keep
        ]


def source_files(root: str) -> list[str]:
    """The Python files below ``root``, relative to it, sorted; installed packages and hidden folders left out."""
    return sorted(_walk(root))


def _walk(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each not in SKIPPED and not each.startswith(".")]
        for file in files:
            if file.endswith(".py"):
                yield str(Path(folder, file).relative_to(root))


def package_of(file: str) -> str:
    """The top-level package or module that a file belongs to."""
    return file.split(os.sep, maxsplit=1)[0].removesuffix(".py")


def survey_file(root: str, file: str) -> Survey:
    """Parse one file. What cannot be read or parsed is counted as an error."""
    try:
        data = Path(root, file).read_bytes()
        text = data.decode(tokenize.detect_encoding(io.BytesIO(data).readline)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code has invalid escapes, and that is not our business
            tree = ast.parse(text, filename=file)
    except (OSError, SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as problem:
        return Survey(files=1, errors=1, broken=[f"{file}: {type(problem).__name__}: {problem}"])
    lines = text.splitlines()
    found = Survey(files=1, lines=len(lines), code_lines=sum(1 for line in lines if line.strip()))
    for node in statements(tree):
        _count(node, file, found)
    found.longest = sorted(found.longest, key=lambda each: -each.lines)[:10]
    return found


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement. What is counted is one, and most nodes of a tree are not: this is several times as quick as walking."""
    left = [tree]
    while left:
        node = left.pop()
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            children = getattr(node, name, ())
            if isinstance(children, list):
                left += children
        yield node


def _count(node: ast.AST, file: str, found: Survey) -> None:
    if isinstance(node, Functions):
        found.functions += 1
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        found.longest.append(Function(node.name, file, node.lineno, length))
    elif isinstance(node, ast.ClassDef):
        found.classes += 1
    elif isinstance(node, ast.Import):
        found.imports.update(alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        found.imports[node.module.partition(".")[0]] += 1


def to_markdown(root: str, total: Survey, packages: dict[str, Survey]) -> str:
    """The report for people."""
    return "\n".join(
        [
            f"# {root}",
            "",
            _summary(total),
            "",
            *_table(
                ("package", "files", "lines", "functions", "classes", "imports most"),
                (
                    (name, each.files, each.lines, each.functions, each.classes, _top(each.imports))
                    for name, each in sorted(packages.items(), key=lambda item: -item[1].lines)[:30]
                ),
            ),
            "",
            "## Longest functions",
            "",
            *_table(
                ("function", "lines", "where"),
                ((each.name, each.lines, f"{each.file}:{each.line}") for each in total.longest),
            ),
            "",
            "## Not parsed",
            "",
            *(f"* {each}" for each in total.broken),
            "",
        ]
    )


def _summary(total: Survey) -> str:
    return (
        f"{total.files:,} files, {total.lines:,} lines ({total.code_lines:,} not blank), "
        f"{total.functions:,} functions, {total.classes:,} classes; {total.errors:,} files could not be parsed."
    )


def _top(imports: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in imports.most_common(3))


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> list[str]:
    shown = [" | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {row} |" for row in shown)]
