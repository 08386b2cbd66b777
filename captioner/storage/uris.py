"""URIs as text: one spelling for one file, joins, no credentials.

A local file is spelled as its absolute path where the path's bytes are UTF-8, whatever the locale,
and as a percent-encoded ``file://`` URI where they are not. Every other URI has its scheme in lower
case, by one name (``s3``, not ``s3a``). A web address is normalised as RFC 3986, section 6.2.2,
says; what follows a bucket's name is left as it is, since a bucket knows no other spelling of it.
"""

import os
import re
import sys
import urllib.parse

from captioner.errors import InputError, without_signatures

__all__ = [
    "absolute",
    "as_path",
    "from_operating_system",
    "has_scheme",
    "join",
    "readable",
    "refuse_credentials",
    "to_operating_system",
]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|file:/", re.IGNORECASE)
_FILE = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)?", re.IGNORECASE | re.DOTALL)
#: Other names of a scheme, by which the same client opens the same file.
_ALIASES = {"s3a": "s3", "gcs": "gs", "az": "abfs", "abfss": "abfs"}
_PORTS = {"http": ":80", "https": ":443"}
_PERCENT = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
# USER:PASSWORD@ before a host or a bucket. A secret may contain a slash; an access point's ARN
# contains colons, and what follows a port is the name of an object.
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?!arn:)[^/:@]*:(?!\d+/)[^@]*@")

# Of a web address, even a name alone before the host may be a token.
_WEB_CREDENTIALS = re.compile(r"(https?://)[^/?#]*@", re.IGNORECASE)


def has_scheme(uri: str) -> bool:
    """Whether a URI begins with a scheme; a local path does not."""
    return _SCHEME.match(uri) is not None


def refuse_credentials(uri: str) -> None:
    """Raises InputError, without repeating them, where a URI contains credentials."""
    if uri.startswith("tar://"):  # an image in a tar file, whose URI follows
        uri = uri.partition("::")[2]
    if match := _CREDENTIALS.match(uri) or _WEB_CREDENTIALS.match(uri):
        redacted = without_signatures(f"{match[1]}…@{uri[match.end() :]}")
        raise InputError(f"{redacted} contains credentials: give them in the environment")


def absolute(uri: str, base: str | None = None) -> str:
    """The one spelling of a URI; a local path starts from ``base`` or the working directory.

    Raises:
        InputError: the URI contains credentials, names a file of another host or is not valid
            Unicode, or the working directory is deleted.
    """
    refuse_credentials(uri)
    if _is_file(uri):
        return readable(_normalised(as_path(uri)))
    if has_scheme(uri):
        scheme, rest = uri.split("://", 1)
        scheme = _ALIASES.get(scheme.lower(), scheme.lower())
        return f"{scheme}://{_web(scheme, rest) if scheme in _PORTS else rest}"
    path = os.path.join(as_path(base or ""), uri)
    if not path.startswith("/"):
        try:
            path = os.path.join(from_operating_system(os.getcwd()), path)
        except FileNotFoundError as error:
            problem = "starts from the working directory, which is deleted"
            raise InputError(f"{uri} {problem}") from error
    return readable(_normalised(path))


def _is_file(uri: str) -> bool:
    return uri[:6].lower() == "file:/"


def _normalised(path: str) -> str:
    path = os.path.normpath(path)
    return path[1:] if path.startswith("//") else path  # normpath keeps two slashes


def _web(scheme: str, rest: str) -> str:
    """What follows ``http://`` or ``https://``, normalised; a fragment is never sent."""
    rest = rest.split("#")[0]
    end = re.search("[/?]", rest)
    authority, place = (rest[: end.start()], rest[end.start() :]) if end else (rest, "/")
    path, mark, query = place.partition("?")
    user, at, host = authority.rpartition("@")
    host = host.lower().removesuffix(_PORTS[scheme])
    return f"{user}{at}{host}{_without_dots(_escaped(path))}{mark}{_escaped(query)}"


def _escaped(text: str) -> str:
    """Unreserved characters decoded, others percent-encoded with upper-case digits."""

    def spell(match: re.Match[str]) -> str:
        if match[1] is None:
            return "%25"
        character = chr(int(match[1], 16))
        return character if _UNRESERVED.fullmatch(character) else match[0].upper()

    kept = "!#$%&'()*+,/:;=?@[]~"
    return urllib.parse.quote(_PERCENT.sub(spell, text), safe=kept, errors="surrogateescape")


def _without_dots(path: str) -> str:
    """A path without ``.`` and ``..`` (RFC 3986, section 5.2.4)."""
    kept: list[str] = []
    segments = path.split("/")[1:] or [""]
    for number, segment in enumerate(segments, 1):
        if segment == "..":
            del kept[-1:]
        if segment not in (".", ".."):
            kept.append(segment)
        elif number == len(segments):
            kept.append("")
    return "/" + "/".join(kept)


def as_path(uri: str) -> str:
    """Converts a ``file:`` URI to a path; returns anything else unchanged.

    Bytes of the path that are not UTF-8 become lone surrogates, as in :pep:`383`.

    Raises:
        InputError: the URI names a file of another host.
    """
    if not _is_file(uri):
        return uri
    match = _FILE.fullmatch(uri)
    host = (match["host"] if match else "") or ""
    if host.lower() not in ("", "localhost"):
        raise InputError(f"{uri}: a file of the host {host}; use file:///PATH for this machine's")
    path = (match["path"] if match else "") or "/"
    return urllib.parse.unquote_to_bytes(path.encode("utf-8", "surrogateescape")).decode(
        "utf-8", "surrogateescape"
    )


def to_operating_system(path: str) -> str:
    """A path as Python's functions of the operating system take it, in any locale."""
    if sys.getfilesystemencoding() == "utf-8":
        return path
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def from_operating_system(path: str) -> str:
    """A path that Python's functions of the operating system return, or an argument of a command.

    In a locale that is not UTF-8, Python decodes the bytes of names by the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return path
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def join(directory: str, name: str) -> str:
    """The URI of ``name`` in ``directory``."""
    return f"{directory.rstrip('/')}/{name}"


def readable(uri: str) -> str:
    """A local path that is valid UTF-8, or, where it is not, the file:// URI of the same file.

    Raises:
        InputError: the text is not Unicode and cannot be a file name.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:
        try:
            return "file://" + urllib.parse.quote(uri.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise InputError(f"{uri!a} is not valid Unicode") from error
    return uri
