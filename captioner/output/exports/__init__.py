"""Exports: a finished output in the form that another tool reads.

An export is a function of the rows whose status is ``ok``. Each file that it writes is there in
full or not at all, so that an export can be killed and run again; a file whose content would not
change is left alone. A file that the export did not write is never replaced unasked.
"""

from captioner.output.exports.export import FORMATS, Format, export
from captioner.output.exports.job import ExportSummary

__all__ = ["FORMATS", "ExportSummary", "Format", "export"]
