"""A PostgreSQL server for tests: made in an empty folder, reached by a socket there, gone in the end."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

_NUMBERS = count(1)


def programs() -> Path | None:
    """Find the server's programs, which Debian keeps off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def postgres_server() -> Iterator[Path]:
    """Run a server; skip the test where PostgreSQL is not installed.

    Yields:
        The folder with its socket.
    """
    binaries = programs()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="rondo-postgres-"))
    # The server refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), *arguments]
        if user is not None:
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    data = folder / "data"
    try:
        run("initdb", "--pgdata", str(data), "--username=rondo", "--auth=trust", "--no-sync", "--encoding=UTF8")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c max_connections=150"
        run("pg_ctl", "--pgdata", str(data), "--wait", "--log", str(folder / "log"), "--options", options, "start")
        try:
            yield folder
        finally:
            run("pg_ctl", "--pgdata", str(data), "--wait", "--mode=immediate", "stop")
    finally:
        shutil.rmtree(folder)


def new_database(folder: Path) -> str:
    """Create an empty database on the server, and return its address."""
    name = f"rondo_{next(_NUMBERS)}"
    with psycopg.connect(host=str(folder), user="rondo", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql+psycopg://rondo@/{name}?host={folder}"
