"""Where the history keeps its files, and the lock that keeps a second projector away from them."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from helmr.errors import ConfigError, Conflict


def journal_of(database: Path) -> Path:
    """The write-ahead log that DuckDB keeps beside a database file, while there is something in it."""
    return database.with_name(f"{database.name}.wal")


@dataclass(frozen=True)
class Home:
    """The files of one history below ``root``."""

    root: Path

    @property
    def history(self) -> Path:
        """The database of everything but logs."""
        return self.root / "history.db"

    @property
    def logs(self) -> Path:
        """The folder of the log databases, one per day."""
        return self.root / "logs"

    @property
    def snapshots(self) -> Path:
        """The folder of the copies that queries read."""
        return self.root / "snapshots"

    @property
    def scratch(self) -> Path:
        """Where DuckDB may spill."""
        return self.root / "tmp"

    @property
    def suspect(self) -> Path:
        """A marker that a write failed as if the file were damaged: the next start checks all of it."""
        return self.root / "history.suspect"

    @property
    def archive(self) -> Path:
        """The folder of the Parquet files of closed days."""
        return self.root / "archive"

    def cold_day(self, day: str) -> Path:
        """The archived log of a day ``YYYYMMDD``."""
        return self.archive / f"logs-{day}.parquet"

    def cold_days(self) -> list[str]:
        """The days there are archived logs for, oldest first."""
        return sorted(path.stem.removeprefix("logs-") for path in self.archive.glob("logs-????????.parquet"))

    def day(self, day: str) -> Path:
        """The log database of a day ``YYYYMMDD``."""
        return self.logs / f"logs-{day}.db"

    def days(self) -> list[str]:
        """The days there are log databases for, oldest first."""
        return sorted(path.stem.removeprefix("logs-") for path in self.logs.glob("logs-????????.db"))

    def make(self) -> None:
        """Create the folders.

        Raises:
            ConfigError: they cannot be written to.
        """
        try:
            for folder in (self.logs, self.archive, self.snapshots, self.scratch):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot write to the history folder {self.root}: {error.strerror}"
            raise ConfigError(message, hint="choose another folder with HELMR_HOME, or fix its permissions") from error

    def lock(self) -> IO[str]:
        """Take the sidecar lock; it is held until the returned file is closed.

        DuckDB's own lock is not enough: it is a POSIX lock, which a process loses without notice when anything in it opens
        and closes the database file.

        Raises:
            Conflict: another process has it.
        """
        handle = (self.root / "history.lock").open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            hint = "stop the other `helmr server` or `helmr dev` first, or set HELMR_HOME to another folder"
            raise Conflict(f"another process has the history in {self.root} open", hint=hint) from error
        return handle
