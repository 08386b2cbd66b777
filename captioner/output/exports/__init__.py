"""Exports: a finished output in the form that another tool reads.

An export writes the rows whose status is ``ok``. It writes each file atomically, so a killed export
can be run again, and leaves a file whose content would not change. It changes a file that it did
not write only as ``--existing`` allows.
"""

from captioner.output.exports.export import FORMATS, Format, export
from captioner.output.exports.job import ExportSummary

__all__ = ["FORMATS", "ExportSummary", "Format", "export"]
