"""Moves closed days out of the database files into Parquet, and has deleted what was kept long enough.

A day of events, or of logs, becomes one Parquet file below ``archive/``: zstd, sorted by position in the log, readable by
anything that reads Parquet. A process killed at any step neither loses nor doubles a row:

* A file is written under another name, synced, and renamed when it is whole.
* The rows of events are deleted from the database in the transaction that enters the file in the table ``archived``;
  before that nobody reads the file, and the next attempt writes it again.
* A day of logs is read from its database as long as there is one, and only then from its Parquet file.
"""

# ruff: noqa: S608  # every name put into SQL here is one of our own schema's; values are parameters or quoted

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb

from store import parquet, schema
from store.home import Home
from store.projector import Lane
from store.retention import Outdated, Retention, Rules, Scopes, note, rewrite, rules
from store.schema import Archived, archived
from store.sinks import Store, transaction
from store.tables import EVENTS, LOGS

log = logging.getLogger(__name__)

#: Seconds between two looks for a day that has closed.
_LOOK = 600.0


class Archive:
    """Archives and deletes by the day; :meth:`run` in a task of its own, beside the projector's."""

    def __init__(self, store: Store, lane: Lane, retention: Retention) -> None:
        self.store = store
        self.retention = retention
        self._home: Home = store.home
        self._lane = lane
        self._scopes = Scopes()

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await self.once(datetime.now(UTC))
            await asyncio.sleep(_LOOK)

    async def once(self, now: datetime) -> None:
        """Bring the files into the state they should be in at ``now``.

        Raises:
            duckdb.Error: the database failed.
        """
        try:
            async with self._lane.commit:
                await asyncio.to_thread(self._checkpoint)
            with self.store.cursor() as cursor:
                applying = rules(cursor, self.retention, now)
            for day in self._closed_event_days(applying.closed("events")):
                await self._archive_events(day)
            closed = applying.closed("logs")
            for day in [day for day in self._home.days() if day < closed and day != self.store.logs.day]:
                await asyncio.to_thread(self._archive_logs, day)
            await self._delete(applying)
        except (OSError, duckdb.IOException, duckdb.TransactionException) as error:
            # A full disk, mostly: what is hot stays hot until there is room.
            log.warning("archiving has to wait: %s", error)

    def _checkpoint(self) -> None:
        """Little traffic would leave rows in the write-ahead log for weeks; were that damaged, the log may have let them go."""
        with self.store.cursor() as cursor:
            cursor.execute("CHECKPOINT h")

    # Events ---------------------------------------------------------------------------------------------------------

    def _closed_event_days(self, closed: str) -> list[str]:
        with self.store.cursor() as cursor:
            sql = "SELECT DISTINCT strftime(\"at\" AT TIME ZONE 'UTC', '%Y%m%d') AS day FROM h.main.events ORDER BY day"
            days = [day for (day,) in cursor.execute(sql).fetchall()]
        return [day for day in days if day < closed]

    async def _archive_events(self, day: str) -> None:
        written = await asyncio.to_thread(self._write_events, day)
        if written is None:
            return
        async with self._lane.commit:
            await asyncio.to_thread(self._enter_events, written)
        log.info("archived the events of %s: %s", day, written.file)

    def _write_events(self, day: str) -> Archived | None:
        """All positions before the first event of a later day; its neighbours' stragglers are in one of the two files."""
        end = datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC) + timedelta(days=1)
        with self.store.cursor() as cursor:
            later = 'coalesce(min(seq) FILTER ("at" >= ?) - 1, max(seq))'
            row = cursor.execute(f"SELECT min(seq), {later} FROM h.main.events", [end]).fetchone()
            if row is None or row[0] is None or row[1] < row[0]:
                return None
            first, last = int(row[0]), int(row[1])
            path = self._home.archive / f"events-{day}-{first}.parquet"
            rows = f"SELECT {schema.plain(EVENTS)} FROM h.main.events WHERE seq BETWEEN {first} AND {last}"
            parquet.write(cursor, "events", rows, path)
        return Archived(day, first, last, path.name)

    def _enter_events(self, written: Archived) -> None:
        with self.store.cursor() as cursor:
            cursor.execute("USE h")
            with transaction(cursor):
                cursor.execute(f"DELETE FROM events WHERE seq BETWEEN {written.first_seq} AND {written.last_seq}")
                cursor.execute("INSERT INTO archived VALUES (?, ?, ?, ?)", list(written))
        self.store.history.changes += 1

    # Logs -----------------------------------------------------------------------------------------------------------

    def _archive_logs(self, day: str) -> None:
        with self.store.cursor() as cursor:
            self.store.use(cursor, day)
            parquet.write(cursor, "logs", f"SELECT {schema.plain(LOGS)} FROM logs", self._home.cold_day(day))
        self.store.logs.forget(day)
        log.info("archived the logs of %s", day)

    # Deletion -------------------------------------------------------------------------------------------------------

    async def _delete(self, applying: Rules) -> None:
        outdated = await asyncio.to_thread(self._outdated, applying)
        if outdated:
            async with self._lane.commit:
                await asyncio.to_thread(self._note, outdated)
        for each in outdated:
            if each.staying:
                await asyncio.to_thread(self._rewrite, each)
            else:
                async with self._lane.commit:
                    await asyncio.to_thread(self._drop, each.path)
            self._scopes.drop(each)
            log.info("deleted from %s what belongs to %s", each.path.name, ", ".join(map(str, sorted(each.going))))
        self._delete_leftovers()

    def _outdated(self, applying: Rules) -> list[Outdated]:
        archive = self._home.archive
        with self.store.cursor() as cursor:
            events = [(each.day, archive / each.file) for each in archived(cursor, "h.main.")]
            logs = [(day, self._home.cold_day(day)) for day in self._home.cold_days()]
            found = self._scopes.outdated(cursor, "events", events, applying)
            return found + self._scopes.outdated(cursor, "logs", logs, applying)

    def _note(self, outdated: list[Outdated]) -> None:
        with self.store.cursor() as cursor:
            cursor.execute("USE h")
            with transaction(cursor):
                note(cursor, outdated)

    def _rewrite(self, each: Outdated) -> None:
        with self.store.cursor() as cursor:
            rewrite(cursor, each)

    def _drop(self, path: Path) -> None:
        with self.store.cursor() as cursor:
            cursor.execute("USE h")
            cursor.execute("DELETE FROM archived WHERE file = ?", [path.name])
        self.store.history.changes += 1
        path.unlink()

    def _delete_leftovers(self) -> None:
        """What a killed process left half-written, and files whose deletion it had only entered."""
        with self.store.cursor() as cursor:
            known = {each.file for each in archived(cursor, "h.main.")}
        for path in self._home.archive.glob("*"):
            if path.suffix == ".part" or (path.name.startswith("events-") and path.name not in known):
                path.unlink()
