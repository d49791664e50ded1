"""Opens the database behind the preference store: SQLite on a disk of this machine, or PostgreSQL.

SQLite runs with a write-ahead log and syncs it at every commit, so that what was acknowledged survives the death of the
process and of the machine. The log is shared memory, which network file systems do not give; there the older rollback
journal is used. Writers take turns: SQLite by itself, PostgreSQL by an advisory lock, so that both behave alike.
"""

import errno
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DatabaseError

from protocol.errors import UserError
from protocol.files import writing

_LOG = logging.getLogger(__name__)
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_S = 60.0
_STORAGE_CODES = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
_ADVISORY_LOCK = 0x726F6E646F  # "rondo"
# Alembic keeps the state of a migration in module globals.
_MIGRATING = threading.Lock()
_NETWORK = re.compile(
    r"nfs4?|lustre|gpfs|cifs|smb\w*|smbfs|ceph|beegfs\w*|afs|9p|glusterfs|pvfs2|orangefs|wekafs|"
    r"fuse\.(sshfs|glusterfs|ceph|juicefs|s3fs|gcsfuse|cvmfs2?|goofys|rclone|lustre|moosefs|mfs)"
)


class Database:
    """A database whose tables are up to date.

    Args:
        url: `sqlite:///path` or `postgresql+psycopg://user:password@host/name`.
        create: Whether a database that is not there yet, or has no tables, is made.
        mounts: The table of mounted file systems.

    Raises:
        UserError: If the address makes no sense, there is nothing and `create` is False, the database cannot be
            reached, or a newer version of the program has written it.
    """

    def __init__(self, url: str, *, create: bool, mounts: Path = Path("/proc/mounts")) -> None:
        address = _parsed(url)
        self.place = address.render_as_string(hide_password=True)
        self.is_sqlite = address.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self.engine = _open_sqlite(address, create=create, mounts=mounts)
        else:
            self.engine = _open_postgresql(address)
        self._turn = threading.Lock()
        try:
            self._migrate(create=create)
        except DatabaseError as error:
            raise UserError(
                "the preference database cannot be opened",
                where=self.place,
                cause=str(error.orig),
                next_step="check the address, the rights, and that the server runs",
            ) from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read one consistent state.

        Raises:
            UserError: If the database is locked or damaged.
        """
        with self._explained(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Write as the only one; committed at the end, undone if anything is raised.

        Raises:
            UserError: If the database is locked or damaged.
            StorageError: If the disk does not take it.
        """
        # The lock spares threads of one process the polling by which SQLite waits.
        with self._turn, self._explained(), self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(rondo_begin="BEGIN IMMEDIATE")
            with connection.begin():
                if not self.is_sqlite:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
                yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what SQLite's errors mean for this file; those of a server stay as they are."""
        try:
            yield
        except DatabaseError as error:
            code = getattr(error.orig, "sqlite_errorcode", None)
            path = Path(str(self.engine.url.database))
            match None if code is None else code & 0xFF:
                case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                    raise UserError(
                        f"the preference database is locked, for more than {_BUSY_S:g} s",
                        where=str(path),
                        cause="another process has begun to write to it and does not end, such as an open SQLite shell",
                        next_step=f"`fuser {path}` lists who has it open; end that one and give the same command again",
                    ) from error
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                    raise UserError(
                        f"the preference database is damaged: {error.orig}",
                        where=str(path),
                        next_step="restore it from a copy, or save what can be read with "
                        f"`sqlite3 {path} .recover | sqlite3 recovered.db`",
                    ) from error
                case found if found in _STORAGE_CODES:
                    with writing(path):
                        raise OSError(_STORAGE_CODES[found], str(error.orig)) from error
            raise

    def _migrate(self, *, create: bool) -> None:
        # Alembic takes a moment to import, and only the program that opens a store needs it.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        steps = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
        with _MIGRATING, self.writing() as connection:
            found = _revision(connection)
            if found is None and not create:
                raise UserError(
                    "there is no preference store in this database", where=self.place, next_step="check the address"
                )
            if found is not None and found not in steps:
                raise UserError(
                    f"the preference store has tables of version {found}, which this version of rondo does not know",
                    where=self.place,
                    cause="a newer version has written it",
                    next_step="update rondo",
                )
            if found != max(steps):
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def file_system_of(path: Path, mounts: str) -> str:
    """Find the type of the file system that holds a path.

    Args:
        path: An absolute path without links.
        mounts: Lines of `device mount-point type ...`, as in /proc/mounts.

    Returns:
        The type, or an empty text if no mount point holds the path.
    """
    kind, longest = "", -1
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        # Spaces and the like are written as octal numbers.
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        # A later line for the same point hides an earlier one.
        if path.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = fields[2], len(point.parts)
    return kind


def is_network(file_system: str) -> bool:
    """Tell whether a type of file system is shared between machines."""
    return _NETWORK.fullmatch(file_system) is not None


def _parsed(url: str) -> URL:
    try:
        address = make_url(url)
    except ArgumentError as error:
        raise UserError(
            "this is no database address",
            # The text itself may hold a password.
            next_step="use sqlite:///path or postgresql+psycopg://user:password@host/name",
        ) from error
    if address.get_backend_name() == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() != "sqlite" or not address.database or address.database == ":memory:":
        raise UserError(
            "the preference store is a file of SQLite or a database of PostgreSQL",
            where=address.render_as_string(hide_password=True),
            next_step="use sqlite:///path or postgresql+psycopg://user:password@host/name",
        )
    return address


def _open_sqlite(address: URL, *, create: bool, mounts: Path) -> Engine:
    path = Path(str(address.database)).resolve()
    if not path.exists():
        if not create:
            raise UserError("there is no preference store here", where=str(path), next_step="check the run directory")
        path.parent.mkdir(parents=True, exist_ok=True)
    kind = file_system_of(path, mounts.read_text() if mounts.exists() else "")
    if is_network(kind):
        _LOG.warning(
            "%s lies on a network file system (%s): SQLite runs there without its write-ahead log, slowly, and is only "
            "as safe as the file locks of that system. Put the run on a local disk, or use PostgreSQL.",
            path,
            kind,
        )
    engine = create_engine(
        f"sqlite:///{path}", connect_args={"timeout": _BUSY_S}, pool_size=16, max_overflow=0, pool_timeout=_BUSY_S
    )
    journal = "DELETE" if is_network(kind) else "WAL"

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, record: Any) -> None:
        del record
        # The driver opens transactions late and not for reading; here they are opened by the listener below.
        connection.isolation_level = None
        _set_journal(connection, journal)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("rondo_begin", "BEGIN"))

    return engine


def _set_journal(connection: sqlite3.Connection, journal: str) -> None:
    """Set the journal mode; SQLite does not wait for others when it changes it, so the waiting is here."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute(f"PRAGMA journal_mode = {journal}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _open_postgresql(address: URL) -> Engine:
    try:
        return create_engine(address, pool_pre_ping=True, pool_size=8, max_overflow=8, pool_timeout=_BUSY_S)
    except ImportError as error:
        raise UserError(
            "the driver for PostgreSQL is not installed",
            where=address.render_as_string(hide_password=True),
            next_step="pip install 'psycopg[binary]'",
        ) from error


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
