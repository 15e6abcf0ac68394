"""One owner of a run's folder at a time."""

import contextlib
import os
import socket
from pathlib import Path

from ..files import UserError

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None

LOCK = ".lock"
HELD = []  # open files: closing one would give up its lock


def lock(folder: Path):
    """Makes this process the owner of a folder until it ends, however it ends.

    `lockf`, not `flock`: workers, which may outlive a killed run for some seconds, do not inherit it.

    Raises:
        UserError: another process owns the folder.
    """
    if fcntl is None:
        return
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    HELD.append(file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"--output_dir: {folder} is in use by {owner}") from error
    except OSError:
        return  # a file system without locks
    with contextlib.suppress(OSError):  # what is written serves the message alone; the disk may be full
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
