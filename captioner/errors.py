"""What captioner raises.

::

    CaptionerError             exit code 1
    ├── InputError             2   an argument, a source or a dataset that cannot be used
    ├── BundleError            2   a model directory that is not a sound bundle
    ├── OutputError            2   an output directory that cannot be used for this job
    │   └── FingerprintError   2   ... because another job's settings made it
    └── IncompleteError        1   the job ended with images unaccounted for

The command line prints the message as one line and exits with ``exit_code``. Everything else
that is raised is a bug, or the machine's.
"""

__all__ = [
    "BundleError",
    "CaptionerError",
    "FingerprintError",
    "IncompleteError",
    "InputError",
    "OutputError",
]


class CaptionerError(Exception):
    """Base of every error that captioner raises on purpose."""

    exit_code = 1


class InputError(CaptionerError, ValueError):
    """An argument, a source of images or a dataset cannot be used."""

    exit_code = 2


class BundleError(CaptionerError):
    """A model directory is missing something, or holds something it must not."""

    exit_code = 2


class OutputError(CaptionerError):
    """An output directory cannot be used for this job."""

    exit_code = 2


class FingerprintError(OutputError):
    """The output directory was begun with another model or other decode settings."""


class IncompleteError(CaptionerError):
    """The job ended, but not every listed image has its row."""
