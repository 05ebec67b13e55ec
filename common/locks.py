"""One process per output: a lock that the system takes back when its holder ends, however that is.

OUT.lock says which process writes OUT. It is deleted at the end; one that a kill has left blocks
nobody.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from common.records import fail

# seconds: a process that was killed a moment ago may still hold its lock
PATIENCE = 5

# {path of a lock file: FileLock} of this process
_held = {}


def lock_output(path):
    """Claims an output for this process; ends the program if another process is writing it.

    With several ranks, rank 0 does this for all.
    """
    lock_path = Path(f"{path}.lock").resolve()
    if lock_path in _held:
        return
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    # a soft lock, which is a mere file, would outlive a kill
    lock = FileLock(lock_path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        if not lock_path.exists():
            fail(f"{lock_path} cannot be created: choose another --out")
        fail(
            f"{path} is being written by {_holder(lock_path)}: wait until it has ended, or choose "
            "another --out"
        )
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        lock_path.unlink(missing_ok=True)
        print(f"{path}: this file system has no locks, so start no second run with this --out")
        return
    _held[lock_path] = lock
    lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")


def release_outputs():
    """Gives up all locks of this process and deletes their files."""
    for lock_path, lock in _held.items():
        # before the release: whoever opened the file meanwhile sees that it is gone, and makes
        # another, so that no two hold locks of one name
        with contextlib.suppress(OSError):
            lock_path.unlink()
        lock.release()
    _held.clear()


def _holder(lock_path):
    """What the lock file says; it is empty for a moment, until its holder has written it."""
    with contextlib.suppress(OSError):
        return lock_path.read_text().strip() or "another process"
    return "another process"
