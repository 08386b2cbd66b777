"""One operation on a file system, retried while its errors are transient."""

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from captioner.errors import CaptionerError, StorageError
from captioner.storage.client_errors import is_of_whole_store, is_transient, reason
from captioner.storage.filesystems import filesystem

__all__ = ["RETRIES", "attempt"]

Result = TypeVar("Result")

RETRIES = 2
_FIRST_WAIT = 0.2  # seconds, doubled each time

_WEB = ("http://", "https://")

# What a bucket's client raises becomes the first of these that it is, or an OSError.
_KINDS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    TimeoutError,
)


def attempt(uri: str, action: Callable[[Any, str], Result], *, retries: int = RETRIES) -> Result:
    """``action(file system, path)``, retried after a growing wait while its error is transient.

    Raises:
        InputError: the URI's scheme is unknown.
        StorageError: the whole store cannot be used. On the web each host is a store of its own,
            and its failures concern the file alone.
        OSError: the action's last error; errors of a bucket's client become OSErrors.
    """
    fs, path = filesystem(uri)
    failures = 0
    while True:
        try:
            return action(fs, path)
        except CaptionerError:
            raise
        except Exception as error:
            if failures >= retries or not is_transient(error):
                if isinstance(fs, LocalFileSystem):
                    raise
                if not uri.startswith(_WEB) and is_of_whole_store(error):
                    raise StorageError(
                        f"cannot use {uri}: {reason(error).rstrip('.')}; check the credentials, "
                        "the endpoint and the network"
                    ) from error
                kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
                raise kind(reason(error)) from error
        # Jitter keeps workers that failed together from retrying together.
        time.sleep(_FIRST_WAIT * 2**failures * random.uniform(0.5, 1))  # noqa: S311
        failures += 1
