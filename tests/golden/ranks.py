"""Runs of several processes on this machine, and the archives that keep what they wrote. Imported by each make.py."""

import socket
import subprocess
import sys
import tarfile


def run(script, made, world, cases):
    """Start one process for each rank of a script, and wait for all: they write into made."""
    made.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, str(script), str(made), str(rank), str(world), str(port), cases] for rank in range(world)
    ]
    started = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in started] == [0] * world


def keep(made, case, archive, entry=None):
    """Pack the folder of a case, and the files next to it that say what the ranks held."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as packed:
        for path in (made / case, *sorted(made.glob(f"{case}.*"))):
            packed.add(path, path.name, filter=entry)
