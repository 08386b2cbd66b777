"""Locks between processes, by files."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec.implementations.local import LocalFileSystem

from captioner.errors import OutputError
from captioner.storage.client_errors import reason
from captioner.storage.filesystems import filesystem

__all__ = ["locked"]


@contextmanager
def locked(uri: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock on a file: no other process can hold it meanwhile. A bucket has no locks.

    The kernel releases the lock when the process ends, however it ends.

    Args:
        uri: the file; created if it does not exist.
        wait: wait until no other process holds the lock.

    Raises:
        OutputError: the file cannot be written, or another process holds the lock and ``wait`` is
            not given.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        yield
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise OutputError(f"cannot write {uri}: {reason(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace")
            raise OutputError(
                f"another job is using this output: {uri} is locked by {holder}; wait until it ends"
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OutputError(f"cannot lock {uri}: {reason(error)}") from error
        yield
