"""The exceptions that captioner raises.

::

    CaptionerError             exit code 1
    ├── InputError             2   an argument, a source or a dataset that cannot be used
    │   └── StorageError       2   ... because its whole store cannot be used (see below)
    ├── BundleError            2   a model directory that is incomplete or damaged
    ├── OutputError            2   an output directory that cannot be used for this job
    │   └── FingerprintError   2   ... because another job's settings made it
    ├── DeviceError            2   a broken or lost device, for example a GPU
    ├── IncompleteError        1   the job ended with images unaccounted for
    ├── ErrorRateError         3   the job ended, but too many of its rows are not ok
    └── StoppedError     130, 143  the job was stopped by Ctrl-C or SIGTERM

The command line prints the message as one line and exits with ``exit_code``. Everything else
that is raised is a bug or a fault of the machine.
"""

import re
from collections.abc import Sequence
from typing import Any

__all__ = [
    "BundleError",
    "CaptionerError",
    "DeviceError",
    "ErrorRateError",
    "FingerprintError",
    "IncompleteError",
    "InputError",
    "OutputError",
    "StoppedError",
    "StorageError",
    "first_of",
    "one_line",
    "printable",
    "without_signatures",
]

# Of S3, Google, CloudFront, Azure, and what other servers call a secret.
_SIGNATURE = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId"
    r"|GoogleAccessId|Key-Pair-Id|Policy|sig|auth|\w*(?:token|secret|password|api_?key))=)[^&#\s'\"]*",
    re.IGNORECASE,
)


class CaptionerError(Exception):
    """Base of every error that captioner raises on purpose. Its subclasses can be pickled."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args), self.__dict__


class InputError(CaptionerError, ValueError):
    """An argument, a source of images or a dataset cannot be used."""

    exit_code = 2


class StorageError(InputError):
    """A whole store cannot be used: no package, no valid credentials, or no answer from its host.

    Every file of the store fails alike. A job stops on this error; it never becomes the row of one
    image, unlike an OSError, which concerns one file.
    """


class BundleError(CaptionerError):
    """A model directory is incomplete, damaged, or holds something unexpected."""

    exit_code = 2


class OutputError(CaptionerError):
    """An output directory cannot be used for this job."""

    exit_code = 2


class FingerprintError(OutputError):
    """The output directory was begun with another model or other decode settings."""


class DeviceError(CaptionerError):
    """A device is broken or lost; no image is at fault."""

    exit_code = 2


class IncompleteError(CaptionerError):
    """The job ended, but not every listed image has its row."""


class ErrorRateError(CaptionerError):
    """Every image has its row, but too many rows of listed images are not ``ok``."""

    exit_code = 3


class StoppedError(CaptionerError):
    """A signal stopped the job; finished shards stay finished."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal


def _unpickled(kind: type[CaptionerError], arguments: tuple[Any, ...]) -> CaptionerError:
    """Rebuilds an error without calling ``__init__``, whose parameters may differ from ``args``."""
    return kind.__new__(kind, *arguments)


def printable(text: str) -> str:
    """Escapes line breaks and control characters, for example of a file name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_signatures(text: str) -> str:
    """Removes the values of signatures and tokens from the queries of web addresses in a text."""
    return _SIGNATURE.sub(r"\1…", text)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or its type's name where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def counted(number: int, noun: str) -> str:
    """A number and its noun, for example ``1 image`` or ``2 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_of(names: Sequence[str], most: int) -> str:
    """Joins the first names with commas, followed by … if there are more."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
