"""A PostgreSQL server of our own, on a socket in a temporary folder: Debian's, under another user where we are root."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEBIAN = Path("/usr/lib/postgresql")


def find_binaries() -> Path | None:
    """The folder of initdb and pg_ctl; None if there is no PostgreSQL here."""
    found = sorted(_DEBIAN.glob("*/bin"), key=lambda path: int(path.parent.name.partition(".")[0]))
    if found:
        return found[-1]
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


@contextmanager
def serve_postgres(binaries: Path) -> Iterator[str]:
    """The URL of its database `postgres`."""
    folder = Path(tempfile.mkdtemp(prefix="flora-pg-", dir="/tmp"))
    user = None
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    options = f"-k {folder} -c listen_addresses= -c fsync=off -c full_page_writes=off"

    def run(*words: str) -> None:
        done = subprocess.run(
            words, user=user, cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
        )
        assert done.returncode == 0, done.stderr + done.stdout

    data = str(folder / "data")
    try:
        run(str(binaries / "initdb"), "-D", data, "-U", "flora", "-A", "trust", "-E", "UTF8", "--no-sync")
        run(str(binaries / "pg_ctl"), "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://flora@/postgres?host={folder}"
        finally:
            run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
