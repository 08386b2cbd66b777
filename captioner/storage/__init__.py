"""Files by URI, through fsspec: list, read, write atomically, lock.

A URI is a local path, a ``file:`` URI (percent-encoded, RFC 8089), a web address (see
:mod:`captioner.storage.web`) or anything that fsspec has a file system for (``s3://``, ``gs://``,
``abfs://``, ``memory://``). Credentials belong to the file
system: they come from the environment and never appear in a message. Errors of a bucket's client
become OSErrors after transient errors have been retried.
"""

from captioner.storage.cache import (
    CACHES,
    Cache,
    cache_directory,
    clear_cache,
    inspect_cache,
    mark_used,
    trim,
)
from captioner.storage.filesystems import arrow_filesystem, is_local
from captioner.storage.finding import FolderError, Listed, PassedOver, find
from captioner.storage.listing import is_directory, names, sizes
from captioner.storage.locks import locked
from captioner.storage.reading import (
    Ranges,
    SeekableFile,
    identify,
    open_binary,
    read,
    read_range,
    size,
    version,
)
from captioner.storage.retries import RETRIES
from captioner.storage.uris import (
    absolute,
    as_path,
    from_operating_system,
    has_scheme,
    join,
    readable,
)
from captioner.storage.web import WebAccess, set_web_access, web_access
from captioner.storage.writing import check_target, delete, is_temporary, write, writing

__all__ = [
    "CACHES",
    "RETRIES",
    "Cache",
    "FolderError",
    "Listed",
    "PassedOver",
    "Ranges",
    "SeekableFile",
    "WebAccess",
    "absolute",
    "arrow_filesystem",
    "as_path",
    "cache_directory",
    "check_target",
    "clear_cache",
    "delete",
    "find",
    "from_operating_system",
    "has_scheme",
    "identify",
    "inspect_cache",
    "is_directory",
    "is_local",
    "is_temporary",
    "join",
    "locked",
    "mark_used",
    "names",
    "open_binary",
    "read",
    "read_range",
    "readable",
    "set_web_access",
    "size",
    "sizes",
    "trim",
    "version",
    "web_access",
    "write",
    "writing",
]
