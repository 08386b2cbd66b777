"""Which fsspec file system a URI belongs to."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from captioner.errors import InputError, StorageError
from captioner.storage.client_errors import reason
from captioner.storage.uris import as_path, has_scheme, refuse_credentials, to_operating_system

__all__ = ["arrow_filesystem", "filesystem", "is_local"]

_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "azure"),
    "hf": "hf",
}


# fsspec's systems over other systems, whose URIs mean nothing without settings of their own.
_WRAPPERS = frozenset(
    (
        *("blockcache", "cached", "filecache", "simplecache", "generic", "reference"),
        *("data", "dir", "libarchive", "tar", "zip"),
    )
)


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path in it.

    Raises:
        StorageError: the package for the scheme is missing, or its settings are wrong.
        InputError: the scheme is unknown, or the URI contains credentials.
    """
    if not has_scheme(path := as_path(uri)):
        return LocalFileSystem(), to_operating_system(path)
    refuse_credentials(uri)
    scheme = uri.split("://")[0]
    if scheme in _WRAPPERS:
        raise InputError(
            f"cannot open {scheme}:// URIs, which lead to files within others: give local paths, "
            "or URIs of a bucket or a web server"
        )
    if scheme in ("http", "https"):
        from captioner.storage.web.files import web_file_system

        return web_file_system(), uri
    try:
        # Not fsspec.url_to_fs: it would take an object's name with "::" in it for several URIs.
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        hint = f"install captioner[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else reason(error)
        raise StorageError(f"cannot open {scheme}:// URIs: {hint}") from error
    except ValueError as error:  # no such protocol
        raise InputError(f"cannot open {scheme}:// URIs: {reason(error)}") from error
    try:
        return _open(kind, uri, is_s3=_EXTRAS.get(scheme) == "s3"), kind._strip_protocol(uri)
    except Exception as error:  # its client lacks an account's name, or an import of its own
        raise StorageError(f"cannot open {scheme}:// URIs: {reason(error)}") from error


def _open(kind: Any, uri: str, *, is_s3: bool) -> Any:
    # Other processes write meanwhile, and their files must be listed: no cache.
    settings = {**kind._get_kwargs_from_urls(uri), "use_listings_cache": False}
    if uri.startswith("hf://"):
        fs = kind(**settings)
        # Its files would read megabytes ahead of a range.
        fs.cat_file = partial(kind.cat_file, fs, cache_type="none")
        return fs
    if not is_s3:
        return kind(**settings)
    # botocore retries a request, in its standard mode three attempts in all unless the
    # environment says otherwise, and we retry too: s3fs, in between, would multiply the two.
    if not os.environ.keys() & {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"}:
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        settings["config_kwargs"] = {"retries": {"mode": "standard"}, **given}
    fs = kind(**settings)
    fs.retries = 1
    fs.split_path = partial(_split_key, kind.split_path.__get__(fs))
    return fs


def _split_key(split: Callable[[str], tuple[str, str, Any]], path: str) -> tuple[str, str, Any]:
    """Splits a path into bucket, key and version; ``?versionId=`` in a key is a part of the key.

    s3fs would take what follows for a version, and read another object.
    """
    before, mark, after = path.partition("?versionId=")
    bucket, key, version = split(before)
    return bucket, key + mark + after, version


def is_local(uri: str) -> bool:
    """Whether a URI is on a file system of this machine, which has locks."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI as pyarrow's file system, and the path in it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(uri)
    return PyFileSystem(FSSpecHandler(fs)), path
