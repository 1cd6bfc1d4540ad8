"""Saved queries of a task project: ``queries/*.sql``, each found by its name and listed with its title."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import msgspec

from helmr.errors import NotFound, UsageError

FOLDER = "queries"

#: What may contain a dollar sign that is no parameter: quoted text and names, and comments.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
_PARAMETER = re.compile(r"(?<![\w$])\$([A-Za-z_]\w*)(?!\$)")


class SavedQuery(msgspec.Struct, frozen=True, kw_only=True):
    """A query in a file: its name is the file's, its title the first line if that is a comment."""

    name: str
    title: str
    parameters: list[str]
    sql: str


def all_of(root: Path) -> list[SavedQuery]:
    """The saved queries of the project in ``root``, by name."""
    return [_read(file) for file in sorted((root / FOLDER).glob("*.sql"))]


def find(root: Path, name: str) -> SavedQuery:
    """The saved query of this name.

    Raises:
        NotFound: there is none; suggests what may have been meant.
        UsageError: its file cannot be read.
    """
    known = sorted(file.stem for file in (root / FOLDER).glob("*.sql"))
    if name in known:
        return _read(root / FOLDER / f"{name}.sql")
    close = get_close_matches(name, known, n=1)
    listing = f"known are {', '.join(known)}" if known else f"put it into {root / FOLDER / name}.sql"
    raise NotFound(f"no saved query {name!r}", hint=f"did you mean @{close[0]}?" if close else listing)


def _read(file: Path) -> SavedQuery:
    try:
        sql = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from error
    first = sql.lstrip().partition("\n")[0]
    title = first.lstrip("- ").strip() if first.startswith("--") else ""
    names = _PARAMETER.findall(_QUOTED.sub(" ", sql))
    return SavedQuery(name=file.stem, title=title, parameters=sorted(set(names)), sql=sql)
