"""A PostgreSQL server from Debian's packages, started by the tests in a folder of their own.

It listens on a Unix socket only. The server refuses to run as root, so root starts it as the user `postgres`
that Debian's package makes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

USER = "postgres"
START_S = 60.0
SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=60")
"""Fast, and what a kill of the server needs; what is committed survives since the store asks for it."""


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`; None if no server is installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


class PostgresServer:
    """One cluster; `stop` ends it and removes its folder."""

    def __init__(self, folder: Path) -> None:
        self._programs = folder
        self.folder = Path(tempfile.mkdtemp(prefix="oa-pg-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._user = USER if os.geteuid() == 0 else None
        if self._user is not None:
            found = pwd.getpwnam(self._user)
            os.chown(self.folder, found.pw_uid, found.pw_gid)
        command = [
            "initdb",
            "-D",
            "data",
            "-U",
            "test",
            "-A",
            "trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--no-locale",
        ]
        self._run(command).wait()
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = [part for setting in SETTINGS for part in ("-c", setting)]
        sockets = ["-c", f"unix_socket_directories={self.folder}", "-c", "listen_addresses="]
        self._process = self._run(["postgres", "-D", "data", *sockets, *options])
        end = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self._dsn("postgres")).close()
                return
            except psycopg.OperationalError:
                log = (self.folder / "log").read_text()
                assert time.monotonic() < end, log
                if self._process.poll() is not None:  # the killed one's children have not ended yet
                    self._process = self._run(["postgres", "-D", "data", *sockets, *options])
                time.sleep(0.05)

    def empty_database(self) -> str:
        """The URL of the one database of the tests, emptied."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return f"postgresql://test@/postgres?host={self.folder}"

    def kill(self) -> None:
        """End the server as `kill -9` does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)  # at once, nothing is kept
            self._process.wait()
        shutil.rmtree(self.folder)

    def _dsn(self, name: str) -> str:
        return f"host={self.folder} user=test dbname={name}"

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / command[0]), *command[1:]],
                cwd=self.folder,
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
