"""The shell of ``helmr query``: statements over several lines, with history, and completion of tables and columns.

It stands on the standard library's readline: what it needs is a line editor, and that is on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli import results, saved
from cli.errors import report
from cli.output import note, table, working
from cli.query import Question, answer, root_of_project
from helmr.errors import HelmrError, UsageError
from store import catalog

#: Statements remembered from one session to the next.
_REMEMBERED = 1000
#: More rows than the history has columns.
_CATALOG_ROWS = 10_000
_PROMPT, _MORE = "helmr> ", "   ...> "
_FORMATS = [form for form in results.FORMATS if form not in results.BINARY]

HELP = """\
A statement ends with ; and may take several lines. Tab completes, Ctrl-C drops what is being typed, Ctrl-D leaves.

.tables          tables and views
.schema [NAME]   columns of one, or of all
.queries         saved queries of the project
.run NAME        run one that has no parameters
.format FORM     table, json, jsonl or csv
.limit N         rows at most
.help            this
.quit            leave"""

#: Words of SQL that completion offers beside tables and columns.
_KEYWORDS = """
select from where group by all order having limit offset distinct join left inner using on as and or not in is null
like ilike between case when then else end with union except intersect count sum avg min max quantile_cont date_trunc
interval now desc asc filter over partition describe summarize
"""


class Shell:
    """Reads statements from a terminal and answers them, until told to stop."""

    def __init__(self, home: Path, form: str, limit: int, timeout: float) -> None:
        self.form = form
        self.limit = limit
        self._timeout = timeout
        self._history = home / "query-history"
        self._columns: dict[str, list[tuple[str, str]]] = {}
        self._offers: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            ".tables": self._tables,
            ".schema": self._schema,
            ".queries": self._queries,
            ".run": self._run_saved,
            ".format": self._set_format,
            ".limit": self._set_limit,
            ".help": lambda _: note(HELP),
        }

    def run(self) -> None:
        """Live; an error of a statement is told, and the next one may be typed.

        Raises:
            HelmrError: nothing answers at all.
        """
        with working("connecting"):
            self._learn()
        note("The history of Helmr; .help explains, .quit leaves.", dim=True)
        remember = self._edit_lines()
        try:
            for statement in self._statements():
                if statement in {".quit", ".exit"}:
                    return
                self._do(statement)
        finally:
            remember()

    def _edit_lines(self) -> Callable[[], None]:
        """Line editing, where Python has it; the function that stores the history at the end."""
        try:
            import readline
        except ImportError:
            return lambda: None
        if self._history.exists():
            readline.read_history_file(self._history)
        readline.set_history_length(_REMEMBERED)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n,;()=<>+-*/|'\"")
        readline.parse_and_bind("tab: complete")

        def remember() -> None:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(self._history)
            self._history.chmod(0o600)

        return remember

    def _statements(self) -> Iterator[str]:
        """What was typed, a statement at a time, until the end of input."""
        held = ""
        while True:
            try:
                typed = input(_MORE if held else _PROMPT)
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("")
                held = ""
                continue
            if not held and typed.startswith("."):
                yield typed.strip()
                continue
            held = f"{held}\n{typed}" if held else typed
            if held.strip() and held.rstrip().endswith(";"):
                yield held.strip()
                held = ""

    def _do(self, statement: str) -> None:
        try:
            if statement.startswith("."):
                self._command(statement)
            else:
                self._answer(statement)
        except KeyboardInterrupt:
            note("interrupted")
        except HelmrError as error:
            report(error, debug=False)

    def _command(self, statement: str) -> None:
        word, _, rest = statement.partition(" ")
        if word not in self._commands:
            raise UsageError(f"no such command: {word}", hint=".help lists them")
        self._commands[word](rest.strip())

    def _answer(self, sql: str) -> None:
        with working("asking"):
            found = answer(Question(sql, {}, self.limit, self._timeout))
        results.write(found, self.form, None)
        sys.stdout.flush()

    def _learn(self) -> None:
        """Name and type of the columns of every table."""
        self._columns = {row["name"]: [] for row in self._ask(catalog.TABLES)}
        for row in self._ask(catalog.columns(self._columns)):
            self._columns[row["name"]].append((row["column_name"], row["column_type"]))

    def _ask(self, sql: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = answer(Question(sql, {}, _CATALOG_ROWS, self._timeout)).to_pylist()
        return rows

    def _tables(self, _rest: str) -> None:
        table(["TABLE", "COLUMNS"], [(name, len(columns)) for name, columns in self._columns.items()])

    def _schema(self, name: str) -> None:
        if name and name not in self._columns:
            raise UsageError(f"there is no table {name!r} here", hint=".tables lists them")
        if not name:
            every = [(each, *column) for each, columns in self._columns.items() for column in columns]
            table(["TABLE", "COLUMN", "TYPE"], every)
            return
        from store.schema import meanings

        told = meanings(name)
        table(["COLUMN", "TYPE", "MEANING"], [(column, kind, told[column]) for column, kind in self._columns[name]])

    def _queries(self, _rest: str) -> None:
        found = saved.all_of(root_of_project())
        table(["NAME", "PARAMETERS", "TITLE"], [(q.name, " ".join(q.parameters), q.title) for q in found])

    def _run_saved(self, name: str) -> None:
        self._answer(saved.find(root_of_project(), name.removeprefix("@")).sql)

    def _set_format(self, form: str) -> None:
        if form not in _FORMATS:
            raise UsageError(f"no such format: {form!r}", hint=f"known are {', '.join(_FORMATS)}")
        self.form = form

    def _set_limit(self, text: str) -> None:
        if not text.isdigit():
            raise UsageError(f"{text!r} is not a number of rows", hint="e.g. .limit 100")
        self.limit = int(text)

    def _complete(self, text: str, state: int) -> str | None:
        """readline's completer: the ``state``-th word that begins with ``text``."""
        if state == 0:
            self._offers = offers(text, self._columns, [*self._commands, ".quit"])
        return self._offers[state] if state < len(self._offers) else None


def offers(text: str, columns: dict[str, list[tuple[str, str]]], commands: list[str]) -> list[str]:
    """What ``text`` may be the beginning of: a command, a table, ``table.column``, a column, a word of SQL."""
    if text.startswith("."):
        return [word for word in commands if word.startswith(text)]
    owner, dot, _ = text.rpartition(".")
    if dot and owner in columns:
        words = [f"{owner}.{name}" for name, _ in columns[owner]]
    else:
        every = {name for listed in columns.values() for name, _ in listed}
        words = [*columns, *sorted(every - set(columns)), *_KEYWORDS.split()]
    begun = [word for word in words if word.startswith(text.lower())]
    return list(dict.fromkeys(begun))
