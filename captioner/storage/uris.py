"""URIs as text: make absolute, join, percent-decode, refuse credentials."""

import os
import re
import urllib.parse

from captioner.errors import InputError

__all__ = ["absolute", "as_path", "has_scheme", "join", "readable", "refuse_credentials"]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# USER:PASSWORD@ before a host or a bucket. A secret may contain a slash; an access point's ARN
# contains colons, and what follows a port is the name of an object.
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?!arn:)[^/:@]*:(?!\d+/)[^@]*@")


def has_scheme(uri: str) -> bool:
    """Whether a URI begins with a scheme; a local path does not."""
    return _SCHEME.match(uri) is not None


def refuse_credentials(uri: str) -> None:
    """Raises InputError, without repeating them, where a URI contains credentials."""
    if match := _CREDENTIALS.match(uri):
        redacted = f"{match[1]}…@{uri[match.end() :]}"
        raise InputError(f"{redacted} has credentials in it: give them by the environment")


def absolute(uri: str, base: str | None = None) -> str:
    """A local path made absolute, from ``base`` or the working directory; else the URI as it is.

    Raises:
        InputError: the URI contains credentials, or the working directory is deleted.
    """
    refuse_credentials(uri)
    if has_scheme(uri):
        return uri
    try:
        return os.path.abspath(os.path.join(base or "", uri))
    except FileNotFoundError as error:
        raise InputError(f"{uri} starts from the working directory, which is deleted") from error


def as_path(uri: str) -> str:
    """The path that a ``file://`` URI stands for; anything else as it is."""
    if uri.startswith("file://"):
        return os.fsdecode(urllib.parse.unquote_to_bytes(uri[len("file://") :]))
    return uri


def join(directory: str, name: str) -> str:
    """The URI of ``name`` in ``directory``."""
    return f"{directory.rstrip('/')}/{name}"


def readable(uri: str) -> str:
    """A local path that is valid UTF-8, or, where it is not, the file:// URI of the same file."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(uri))
    return uri
